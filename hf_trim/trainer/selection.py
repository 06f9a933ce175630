"""
Step 3 (keep decision) of: batch → per-item losses → keep decision → trimmed backward → logs.

The items to keep, from their losses and the fraction p. For example, losses `[4]` = (0.1, 2.0, 0.5, 2.0) and p = 0.5:
k = 2 items are kept, those with the indices (1, 3). With p = 0.25 it is item 1: of equal losses the first is kept.
With a share m of the mass in the place of p, e.g. (0.1, 0.6, 0.1, 0.2) and m = 0.75: items 1 and 3 carry 0.8. If the
mini-batches so far had a mass of 2, 0.5 may be left out: item 1 is enough.
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
    return top_items(losses, num_kept(keep, n), valid=valid, select=select, generator=generator)


def num_carrying(mass: Tensor, share: float, least_total: float = 0.0) -> int:
    """
    The number of the largest items that together carry all of the mass but a share.

    Args:
        mass (`torch.Tensor`): Mass of each item, of any shape; 0 for those that are no items.
        share (`float`): Share m of the mass to carry, in (0, 1].
        least_total (`float`, *optional*, defaults to 0.0): What is left out is at most 1 − m of the mass of all items,
            or of this, if it is more.

    Returns:
        `int`: The smallest such number, but at least 1.
    """
    if not mass.numel():
        return 0
    # In float64, so that a share of 1 is carried by all items that have a mass.
    carried = mass.detach().flatten().double().sort(descending=True).values.cumsum(0)
    total = carried[-1]
    least = total - (1 - share) * total.clamp(min=least_total) if least_total else share * total
    return min(len(carried), 1 + int((carried < least).sum()))


def without_hardest(scores: Tensor, valid: Tensor, share: float) -> Tensor:
    """
    Leave out the items with the highest scores. Where labels are wrong, these are the first suspects (DORO, Zhai et
    al., arXiv 2106.06142; adaptive-k, arXiv 2203.14165).

    Args:
        scores (`torch.Tensor`): `[n]` scores.
        valid (`torch.Tensor`): `[n]`, which of them are items.
        share (`float`): Share of the n items to leave out, in [0, 1); rounded to a number, and one item stays.

    Returns:
        `torch.Tensor`: `[n]`, which of them are left.
    """
    n = int(valid.sum()) if share else 0
    count = min(n - 1, round(share * n))
    return valid if count <= 0 else valid.index_fill(0, top_items(scores, count, valid=valid), False)


def top_items(
    scores: Tensor,
    count: int,
    *,
    ties: Tensor | None = None,
    valid: Tensor | None = None,
    select: str = "hardest",
    generator: torch.Generator | None = None,
) -> Tensor:
    """
    A number of items with the highest scores, or of random ones.

    Args:
        scores (`torch.Tensor`): Scores of any shape.
        count (`int`): Number k of items to keep.
        ties (`torch.Tensor`, *optional*): In the shape of the scores: of equal scores, the highest of these come
            first.
        valid, select, generator: As in [`select_items`].

    Returns:
        `torch.Tensor`: `[k]` ascending indices into `scores.flatten()`; empty if no item is valid.
    """
    n = scores.numel() if valid is None else int(valid.sum())
    k = n if select == "none" else min(n, count)
    if k == n:
        if valid is None:
            return torch.arange(n, device=scores.device)
        return valid.flatten().nonzero().flatten()
    if select == "random":
        scores = torch.rand(scores.numel(), generator=generator).to(scores.device)
    else:
        scores = scores.detach().flatten()
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if valid is not None:
        scores = scores.masked_fill(~valid.flatten(), -torch.inf)
    if ties is None or select == "random":
        hardest_first = torch.sort(scores, descending=True, stable=True).indices
    else:
        by_ties = torch.sort(ties.detach().flatten(), descending=True, stable=True).indices
        hardest_first = by_ties[torch.sort(scores[by_ties], descending=True, stable=True).indices]
    return hardest_first[:k].sort().values
