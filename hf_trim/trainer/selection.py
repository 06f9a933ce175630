"""
Step 3 (keep decision) of: batch → per-item losses → keep decision → trimmed backward → logs.

The items to keep, from their losses and the fraction p. For example, losses `[4]` = (0.1, 2.0, 0.5, 2.0) and p = 0.5:
k = 2 items are kept, those with the indices (1, 3). With p = 0.25 it is item 1: of equal losses the first is kept.
"""

import torch
from torch import Tensor


SELECT_CHOICES = ("hardest", "random", "none")
NONFINITE_CHOICES = ("error", "drop")


def num_kept(keep: float, num_items: int) -> int:
    """
    The number of items to keep: k = max(1, round(p·n)), or 0 if there is no item. `round` is Python's: halves go to
    the even number.

    Args:
        keep (`float`): Fraction p to keep, in (0, 1].
        num_items (`int`): Number n of valid items.

    Returns:
        `int`: Number of items to keep.
    """
    return min(num_items, max(1, round(keep * num_items)))


def select_items(
    losses: Tensor,
    keep: float,
    *,
    valid: Tensor | None = None,
    select: str = "hardest",
    generator: torch.Generator | None = None,
) -> Tensor:
    """
    Choose the items of a batch that count for the training loss.

    Losses are compared in float32 at least. Of equal losses the first are kept, so that the choice is deterministic.

    Args:
        losses (`torch.Tensor`): Unreduced losses of any shape, e.g. `[B]` or `[B, T]`.
        keep (`float`): Fraction p of the valid items to keep, in (0, 1].
        valid (`torch.Tensor`, *optional*): Boolean mask of the shape of `losses`. Other items are never kept and do
            not count in n.
        select (`str`, *optional*, defaults to `"hardest"`): `"hardest"` keeps the highest losses, `"random"` a
            random subset of the same size (the control), `"none"` everything.
        generator (`torch.Generator`, *optional*): Source of the random subset, on the CPU.

    Returns:
        `torch.Tensor`: `[k]` ascending indices into `losses.flatten()`; empty if no item is valid.
    """
    n = losses.numel() if valid is None else int(valid.sum())
    k = n if select == "none" else num_kept(keep, n)
    if k == n:
        if valid is None:
            return torch.arange(n, device=losses.device)
        return valid.flatten().nonzero().flatten()
    if select == "random":
        scores = torch.rand(losses.numel(), generator=generator).to(losses.device)
    else:
        scores = losses.detach().flatten()
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if valid is not None:
        scores = scores.masked_fill(~valid.flatten(), -torch.inf)
    hardest_first = torch.sort(scores, descending=True, stable=True).indices
    return hardest_first[:k].sort().values
