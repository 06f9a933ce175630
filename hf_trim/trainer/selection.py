"""
Step 3 (keep decision) of: batch → per-item losses → keep decision → trimmed backward → logs.

The items to keep, from their losses and the fraction p. For example, losses `[4]` = (0.1, 2.0, 0.5, 2.0) and p = 0.5:
k = 2 items are kept, those with the indices (1, 3). With p = 0.25 it is item 1: of equal losses the first is kept.
With a share m of the mass in the place of p, e.g. (0.1, 0.6, 0.1, 0.2) and m = 0.75: items 1 and 3 carry 0.8. If the
mini-batches so far had a mass of 2, 0.5 may be left out: item 1 is enough.
"""

from typing import Any

import torch
from torch import Tensor

from hf_trim.backward import waiting


SELECT_CHOICES = ("hardest", "random", "none")
NONFINITE_CHOICES = ("error", "drop")


def _rounded(share: float, number: int | Tensor) -> Any:
    """A share of a number, rounded as Python does it: halves go to the even number."""
    if isinstance(number, Tensor):
        return (number.double() * share).round().long()
    return round(share * number)


def num_kept(keep: float, num_items: int | Tensor) -> Any:
    """
    The number of items to keep: k = max(1, round(p·n)), or 0 if there is no item. `round` is Python's: halves go to
    the even number.

    Args:
        keep (`float`): Fraction p to keep, in (0, 1].
        num_items (`int` or `torch.Tensor`): Number n of valid items.

    Returns:
        `int` or `torch.Tensor`: Number of items to keep, where n is: the host does not wait for a tensor.
    """
    count = _rounded(keep, num_items)
    if isinstance(num_items, Tensor):
        return count.clamp(min=1).minimum(num_items)
    return min(num_items, max(1, count))


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
    valid = torch.ones_like(losses, dtype=torch.bool) if valid is None else valid
    count = n if select == "none" else num_kept(keep, n)
    chosen = top_mask(losses.flatten(), count, valid.flatten(), select=select, generator=generator)
    return places(chosen, None if waiting.reads_freely(losses.device) else count)


def num_carrying(mass: Tensor, share: float, least_total: Tensor | float = 0.0) -> Tensor:
    """
    The number of the largest items that together carry all of the mass but a share.

    Args:
        mass (`torch.Tensor`): Mass of each item, of any shape; 0 for those that are no items.
        share (`float`): Share m of the mass to carry, in (0, 1].
        least_total (`float` or `torch.Tensor`, *optional*, defaults to 0.0): What is left out is at most 1 − m of the
            mass of all items, or of this, if it is more.

    Returns:
        `torch.Tensor`: The smallest such number, but at least 1.
    """
    if not mass.numel():
        return torch.zeros((), dtype=torch.long, device=mass.device)
    # In float64, so that a share of 1 is carried by all items that have a mass.
    carried = mass.detach().flatten().double().sort(descending=True).values.cumsum(0)
    total = carried[-1]
    # Without a history it is a share of the mass itself, which a difference would miss by a rounding error.
    least_total = torch.as_tensor(least_total, dtype=total.dtype, device=total.device)
    least = torch.where(least_total > 0, total - (1 - share) * total.maximum(least_total), share * total)
    return ((carried < least).sum() + 1).clamp(max=len(carried))


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
    if not share:
        return valid
    n = waiting.number(valid.sum())
    count = _rounded(share, n)
    if isinstance(n, Tensor):
        count = count.minimum(n - 1)
    elif (count := min(count, n - 1)) <= 0:
        return valid
    return valid & ~top_mask(scores, count, valid)


def top_mask(
    scores: Tensor,
    count: int | Tensor,
    valid: Tensor,
    *,
    ties: Tensor | None = None,
    select: str = "hardest",
    generator: torch.Generator | None = None,
) -> Tensor:
    """
    A number of items with the highest scores, or random ones. The host does not wait for the device.

    Args:
        scores (`torch.Tensor`): `[n]` scores.
        count (`int` or `torch.Tensor`): Number k of items to keep.
        valid (`torch.Tensor`): `[n]`, which of them are items.
        ties (`torch.Tensor`, *optional*): In the shape of the scores: of equal scores, the highest of these come
            first.
        select, generator: As in [`select_items`].

    Returns:
        `torch.Tensor`: `[n]`, which of them are kept.
    """
    if select == "none" or waiting.reads_freely(scores.device) and int(valid.sum()) <= int(count):
        return valid
    if select == "random":
        scores, ties = waiting.to_device(torch.rand(len(scores), generator=generator), scores.device), None
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~valid, -torch.inf)
    if ties is None:
        hardest_first = torch.sort(scores, descending=True, stable=True).indices
    else:
        by_ties = torch.sort(ties.detach(), descending=True, stable=True).indices
        hardest_first = by_ties[torch.sort(scores[by_ties], descending=True, stable=True).indices]
    is_kept = torch.arange(len(scores), device=scores.device) < count
    return valid & torch.empty_like(valid).index_copy_(0, hardest_first, is_kept)


def places(mask: Tensor, most: int | None) -> Tensor:
    """
    Where a mask is true, with a number of places that the host knows.

    Args:
        mask (`torch.Tensor`): `[n]`, true at `most` places at most.
        most (`int`, *optional*): This number. Without, the host waits for the number of places.

    Returns:
        `torch.Tensor`: `[most]` ascending indices: all where it is true, and some others if there are fewer.
    """
    if most is None:
        return mask.nonzero().flatten()
    if most >= len(mask):
        return torch.arange(len(mask), device=mask.device)
    return (~mask).to(torch.uint8).sort(stable=True).indices[:most].sort().values
