"""The reference backward pass: ordinary autograd, which pushes zeros through the part of the batch not kept."""

from torch import Tensor


def take_rows_dense(losses: Tensor, kept: Tensor) -> Tensor:
    """
    The kept losses; the gradient is an ordinary dense tensor, zero for the other items.

    Args:
        losses (`torch.Tensor`): `[n]` losses.
        kept (`torch.Tensor`): `[k]` indices.

    Returns:
        `torch.Tensor`: `[k]` losses.
    """
    return losses.index_select(0, kept)
