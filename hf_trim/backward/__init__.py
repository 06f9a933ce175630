"""Kept items → gradients: the ways to run the backward pass."""

from torch import Tensor

from hf_trim.backward.dense import take_rows_dense


BACKWARD_CHOICES = ("auto", "dense")
_TAKE = {"auto": take_rows_dense, "dense": take_rows_dense}


def take_kept(losses: Tensor, kept: Tensor, backward: str) -> Tensor:
    """
    The kept losses, with the chosen backward pass behind them.

    Args:
        losses (`torch.Tensor`): Unreduced losses of any shape, n in all.
        kept (`torch.Tensor`): `[k]` ascending indices into `losses.flatten()`.
        backward (`str`): `"dense"` for ordinary autograd; `"auto"` for the best exact way there is.

    Returns:
        `torch.Tensor`: `[k]` losses.
    """
    losses = losses.flatten()
    # Everything is kept: the plain loss, with no gather in between.
    return losses if kept.numel() == losses.numel() else _TAKE[backward](losses, kept)
