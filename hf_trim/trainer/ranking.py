"""
Step 3 (keep decision) of: batch → per-item losses → keep decision → trimmed backward → logs.

What the items of a mini-batch are ranked by. For example, start and end of an answer for B = 4 samples: two calls of
the loss function, each with losses `[4]` and a weight of 1/2 in the loss. The items are the samples, and their scores
`[4]` the means of the two.

A batch may have several calls of loss functions. What they are over decides which items are ranked together:

- losses that are one for each sample (start and end of an answer), or that have the same targets (a main and an
  auxiliary label map), belong to the same items. These are ranked by the sum, weighted as in the batch's loss;
- sums by the same function over different targets are pieces of one loss (a long text in chunks): one ranking;
- any others (tokens and pairs of sentences, two tasks of which each sample has one) are ranked separately.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_trim.trainer.late_checks import LateChecks
from hf_trim.trainer.losses import LossCall


NONFINITE_ADVICE = "Look at the data and the learning rate; trim_nonfinite='drop' leaves such samples out."
Track = list[tuple[LossCall, Tensor]]  # calls over the same items, and the weight of each


def total_weight(call: LossCall, weight: Tensor) -> Tensor:
    """
    Args:
        call ([`~hf_trim.trainer.losses.LossCall`]): A call.
        weight (`torch.Tensor`): That of its value in the mini-batch's loss.

    Returns:
        `torch.Tensor`: The weight of all its losses together.
    """
    if call.reduction == "mean" or weight.dim():
        return weight.sum()
    return weight * call.scale * call.losses.numel()


def groups_of(calls: Track, is_per_sample: Callable[[LossCall], bool]) -> list[list[Track]]:
    """
    Sort calls by what they are over.

    Args:
        calls (`list`): All calls, and the weight of each.
        is_per_sample (`Callable`): Whether the items of a call are samples.

    Returns:
        `list`: Groups that are ranked together, of calls over the same items.
    """
    tracks: dict[tuple, Track] = {}
    for number, (call, weight) in enumerate(calls):
        target = call.target
        if is_per_sample(call):
            key: tuple = ("samples",)
        elif target is None:
            key = (number,)
        else:
            key = (target.data_ptr(), target.shape, target.stride(), call.losses.numel())
        tracks.setdefault(key, []).append((call, weight))
    groups: dict[tuple, list[Track]] = {}
    for key, track in tracks.items():
        is_piece = len(track) == 1 and track[0][0].reduction == "sum" and key != ("samples",)
        groups.setdefault(track[0][0].kind if is_piece else (key,), []).append(track)
    return list(groups.values())


class Items(NamedTuple):
    """
    The items of a track.

    Args:
        scores (`torch.Tensor`): `[n]`, what they are ranked by: the loss, weighted over the calls.
        mass (`torch.Tensor`): `[n]` gradient mass.
        valid (`torch.Tensor`): `[n]`, which of them have a label.
        finite (`torch.Tensor`): `[n]`, which of them have neither NaN nor infinity.
        counts (`torch.Tensor`): `[n, calls]`, what each item counts for in the mean of each call.
    """

    scores: Tensor
    mass: Tensor
    valid: Tensor
    finite: Tensor
    counts: Tensor

    @classmethod
    def joined(cls, parts: list["Items"]) -> "Items":
        """The items of several tracks that are ranked together."""
        return parts[0] if len(parts) == 1 else cls(*map(torch.cat, zip(*parts, strict=True)))


def items_of(track: Track, is_per_sample: bool) -> Items:
    """
    Rank the items of some calls.

    Args:
        track (`list`): The calls, which are over the same items, and the weight of each in the loss.
        is_per_sample (`bool`): Whether items are samples: `[B, T]` losses are averaged over T.

    Returns:
        [`Items`]: The items.
    """
    total = torch.stack([weight for _, weight in track]).abs().sum()
    parts: list[Items] = []
    for call, weight in track:
        share = torch.where(total != 0, weight / total, 1 / len(track))
        scores, mass, counts = call.scores, call.mass(), call.counts
        valid, finite = call.labelled, call.finite | ~call.labelled
        if is_per_sample and call.losses.shape[1] > 1:
            counts = counts.sum(1)
            divisor = counts.where(counts != 0, 1)
            scores, mass = scores.where(valid, 0).sum(1) / divisor, mass.sum(1) / divisor
            valid, finite = valid.any(1), finite.all(1)
        scores, mass = share * scores.flatten(), share.abs() * mass.flatten()
        parts.append(Items(scores, mass, valid.flatten(), finite.flatten(), counts.flatten()))
    if len(parts) == 1:
        return parts[0]._replace(counts=parts[0].counts[:, None])
    scores, mass, valid, finite, counts = map(torch.stack, zip(*parts, strict=True))
    return Items(scores.sum(0), mass.sum(0), valid.any(0), finite.all(0), counts.t())


def check_samples(
    call: LossCall, labels: Tensor | None, batch_size: int, checks: LateChecks, message: str | None = None
) -> None:
    """
    Check that each sample has as many losses as labels. Some models leave out what has no label, so that losses are
    not in the places of their labels.

    Args:
        call ([`~hf_trim.trainer.losses.LossCall`]): A call with several losses for each sample.
        labels (`torch.Tensor`, *optional*): `[B, ...]` labels.
        batch_size (`int`): Number B of samples.
        checks ([`~hf_trim.trainer.late_checks.LateChecks`]): Raises the error.
        message (`str`, *optional*): What is said then, with a place `{count}` for the number of losses.
    """
    if labels is None or labels.dim() < 2 or call.ignore_index is None:
        return
    labels = labels.to(call.losses.device)
    labelled, num_losses = labels.ne(call.ignore_index), call.labelled.sum(1)
    fits = [_are_equal(num_losses, x.flatten(1).sum(1)) for x in (labelled, labelled[..., 1:])]
    is_wrong = ~(fits[0] | fits[1])
    if call.target is not None and call.target.numel() == call.losses.numel():
        turned = call.target.reshape(call.losses.shape[::-1]).t()  # [T, B] → [B, T]
        rows = call.target.reshape(call.losses.shape)
        for expected in (labels, labels[..., 1:]):
            is_wrong = is_wrong | (_are_equal(turned, expected) & ~_are_equal(rows, expected))
    checks.refuse(torch.where(is_wrong, num_losses.sum(), 0), message or unknown_samples(batch_size))


def _are_equal(a: Tensor, b: Tensor) -> Tensor:
    """`torch.equal`, for which the host need not wait."""
    return (a == b).all() if a.shape == b.shape else torch.zeros((), dtype=torch.bool, device=a.device)


def unknown_samples(batch_size: int) -> str:
    """What is said where it is not known which losses belong to which sample; `{count}` is the number of losses."""
    return (
        f"The model has {{count}} losses for {batch_size} samples, and which belong to which is not known: use "
        "trim_unit='token' and trim_nonfinite='error'."
    )
