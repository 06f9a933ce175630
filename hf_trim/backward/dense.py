"""
The reference backward pass: ordinary autograd, which pushes zeros through the part of the batch that is not kept.

e.g. losses `[B]`, B = 4, kept 1 and 3: the gradient `[2]` of the kept losses becomes an ordinary `[4]` with two zeros.
"""

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
