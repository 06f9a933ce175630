"""
Kept items → gradients: the ways to run the backward pass. This package imports nothing else of hf_trim.

e.g. losses `[B]`, B = 4, kept 1 and 3: `take_kept(losses, torch.tensor([1, 3]), "sparse")` is `[2]`, equal to
`losses[[1, 3]]`. Behind it every layer's gradient is computed for two samples instead of four.
"""

from torch import Tensor

from hf_trim.backward.dense import take_rows_dense
from hf_trim.backward.eager.rows import NotRowwiseError
from hf_trim.backward.eager.sparse import take_rows_sparse
from hf_trim.backward.eager.zero_rows import skip_zero_rows
from hf_trim.backward.registry import implements
from hf_trim.backward.settings import checked, fallback_report, reset_fallbacks, strict, taped


__all__ = [
    "BACKWARD_CHOICES",
    "NotRowwiseError",
    "checked",
    "fallback_report",
    "implements",
    "reset_fallbacks",
    "skip_zero_rows",
    "strict",
    "take_kept",
    "take_rows_sparse",
    "taped",
]


BACKWARD_CHOICES = ("auto", "dense", "sparse", "replay")


def take_kept(losses: Tensor, kept: Tensor, backward: str) -> Tensor:
    """
    The kept losses; their backward pass is the chosen one.

    Args:
        losses (`torch.Tensor`): Unreduced losses of any shape, n in all.
        kept (`torch.Tensor`): `[k]` different indices into `losses.flatten()`, in any order.
        backward (`str`): `"dense"` for ordinary autograd, `"sparse"` for row-sparse gradients.

    Returns:
        `torch.Tensor`: `[k]` losses, in the order of `kept`; in their own where all are kept.
    """
    losses = losses.flatten()
    if kept.numel() == losses.numel():
        return losses  # the plain loss, with no gather in between
    return take_rows_dense(losses, kept) if backward == "dense" else take_rows_sparse(losses, kept)
