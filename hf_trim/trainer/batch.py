"""The trimming of one mini-batch: calls of loss functions → kept items → the loss to train with."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_trim.backward import take_kept
from hf_trim.backward.eager.sparse import take_rows_sparse
from hf_trim.trainer.arguments import TrimmingConfig
from hf_trim.trainer.heads import HOW_TO_PASS_A_LOSS
from hf_trim.trainer.losses import LossCall
from hf_trim.trainer.selection import num_kept, select_items


@dataclass
class StepShare:
    """
    A mini-batch among those of its optimizer step, on all devices; from labels alone, before any of them is run.

    Args:
        kept (`float`): Its share of the items that the step keeps.
        valid (`float`): Its share of the items of the step.
        items_per_kept (`float`): Items of the step by items it keeps, 1/p but for rounding.
    """

    kept: float = 1.0
    valid: float = 1.0
    items_per_kept: float = 1.0


@dataclass
class Selection:
    """
    What is kept of some losses over the same items, and what that counts for.

    Args:
        kept (`torch.Tensor`): `[k]` indices of items of this process.
        elements (`torch.Tensor`): Indices of their losses: the same, or those of all tokens of the samples.
        counts (`list[torch.Tensor]`): Of each call, the sum of its counts, kept or not.
        kept_counts (`list[torch.Tensor]`): Of each call, the sum of those that are kept. Both are of all processes
            among whose items the hardest were chosen.
        share ([`StepShare`]): What all of it is in the optimizer step.
    """

    kept: Tensor
    elements: Tensor
    counts: list[Tensor]
    kept_counts: list[Tensor]
    share: StepShare


@dataclass
class ProcessGroup:
    """
    The processes among whose items together the hardest are chosen (`trim_scope="global"`).

    Args:
        gather (`Callable`): `[m]` of each process → `[processes, m]`, on all of them.
        rank (`int`): Number of this one.
    """

    gather: Callable[[Tensor], Tensor]
    rank: int

    def sum(self, values: list[Tensor]) -> list[Tensor]:
        """
        Args:
            values (`list[torch.Tensor]`): Scalars.

        Returns:
            `list[torch.Tensor]`: Their sums over the processes.
        """
        return list(self.gather(torch.stack(values)).sum(0))

    def union(self, scores: Tensor) -> tuple[Tensor, int]:
        """
        Args:
            scores (`torch.Tensor`): `[n]`; n may differ between the processes.

        Returns:
            `tuple[torch.Tensor, int]`: All scores, process by process, and where those of this one begin.
        """
        sizes = self.gather(torch.tensor([len(scores)], device=scores.device)).flatten().tolist()
        found = self.gather(torch.nn.functional.pad(scores, (0, max(sizes) - len(scores))))
        return torch.cat([each[:size] for each, size in zip(found, sizes, strict=True)]), sum(sizes[: self.rank])

    def join_without_items(self, num_calls: int, like: Tensor) -> None:
        """
        Take part in a selection without an item: other processes have a mini-batch more than this one.

        Args:
            num_calls (`int`): Number of calls of loss functions over the same items.
            like (`torch.Tensor`): Of the type and on the device of losses.
        """
        self.sum([like.new_zeros(())] * num_calls)
        self.union(like.new_zeros(0))
        self.sum([like.new_zeros(())] * (num_calls + 2))


@dataclass
class TrimmedBatch:
    """
    Turns the loss of a whole mini-batch into that of the items to keep.

    Losses over the same items (start and end of an answer, a main and an auxiliary label map) are ranked by their sum,
    weighted as in the model's loss; those over other items (tokens and pairs of sentences) apart. What else is in the
    model's loss, such as the load balance of a mixture of experts, stays.

    Args:
        config ([`~hf_trim.trainer.arguments.TrimmingConfig`]): What is trimmed, and how.
        keep (`float`): Fraction p to keep.
        backward (`str`): `"dense"`, `"sparse"` or `"replay"`.
        batch_size (`int`): Number B of samples.
        share (`Callable`): `f(call, per_token)` → the [`StepShare`] of this mini-batch.
        zero (`Callable`): A zero whose gradient is zero for each parameter, for a mini-batch without items.
        generator (`torch.Generator`, *optional*): Source of random subsets.
        num_items (`torch.Tensor` or `int`, *optional*): Number of labels that the model divides by, if it does.
        mean_scale (`float`, *optional*, defaults to 1.0): Factor of losses that are means.
        labels (`torch.Tensor`, *optional*): `[B, ...]` labels, to make sure which losses are which sample's.
        process_group ([`ProcessGroup`], *optional*): Without, the hardest are chosen among the items of this process.
    """

    config: TrimmingConfig
    keep: float
    backward: str
    batch_size: int
    share: Callable[[LossCall, bool], StepShare]
    zero: Callable[[], Tensor]
    generator: torch.Generator | None = None
    num_items: Tensor | int | None = None
    mean_scale: float = 1.0
    labels: Tensor | None = None
    process_group: ProcessGroup | None = None

    def __post_init__(self):
        self.samples: Tensor | None = None  # `[k]` kept ones, once they are chosen, where items are samples
        self.dropped = 0  # samples left out for losses that are not finite
        self.logged: list[Tensor] | None = None  # kept and valid items, threshold, mean over all
        self._selections: list[Selection] | None = None  # of the first forward pass
        self._replays = False

    def __call__(self, loss: Tensor, calls: list[LossCall]) -> Tensor:
        """
        Args:
            loss (`torch.Tensor`): The model's scalar loss, computed from the calls' values.
            calls (`list` of [`~hf_trim.trainer.losses.LossCall`]): What it averaged.

        Returns:
            `torch.Tensor`: The scalar loss to train with: of a mean, this mini-batch's share in that of its optimizer
            step; of a sum, the sum scaled up to that of all items.
        """
        if loss.requires_grad:
            calls = [call for call in calls if call.value.requires_grad]  # others were metrics
            values = [call.value for call in calls]
            weights = torch.autograd.grad(loss, values, create_graph=True, allow_unused=True)
            if any(weight is not None and weight.requires_grad for weight in weights):
                raise ValueError(
                    "The model's loss is no linear function of the means that torch's loss functions gave it, and "
                    f"cannot be trimmed by itself. {HOW_TO_PASS_A_LOSS}"
                )
        else:  # scores only
            weights = [torch.ones_like(call.value) for call in calls]
        used = [(call, weight.detach()) for call, weight in zip(calls, weights, strict=True) if weight is not None]
        if not used:
            raise ValueError(
                f"The model's loss does not depend on any call of a loss function of torch. {HOW_TO_PASS_A_LOSS}"
            )
        groups: dict[int, list[tuple[LossCall, Tensor]]] = {}
        for call, weight in used:
            groups.setdefault(call.losses.numel(), []).append((call, weight))
        self._selections = self._selections or []
        for index, group in enumerate(groups.values()):
            if not self._replays:
                self._selections.append(self._select(group))
            whole = sum(weight * call.value.detach() for call, weight in group)
            loss = loss + (self._trimmed(group, self._selections[index]) - whole).to(loss.dtype)
        if all(call.reduction == "sum" for call, _ in used):
            return loss
        # A mean over tokens that is trimmed by samples keeps a number of tokens that only the selection tells.
        share = self._selections[0].share
        return loss * self.mean_scale * (share.kept if self._is_natural(used[0][0]) else share.valid)

    @property
    def is_done(self) -> bool:
        """Whether there was a loss to trim."""
        return self._selections is not None

    def begin_replay(self) -> Tensor:
        """
        After a forward pass without gradients, whose loss chose the samples, comes one on these.

        Returns:
            `torch.Tensor`: `[k]` indices of samples; without a valid item the first, so that there is a graph.
        """
        kept = self.samples if self.samples.numel() else self.samples.new_zeros(1)
        self.batch_size, self._replays = len(kept), True
        return kept

    def _is_natural(self, call: LossCall) -> bool:
        """Whether an item is what the loss function has a value for."""
        return call.losses.numel() == self.batch_size or self.config.trim_unit != "sample"

    def join_without_items(self) -> None:
        """Take part in the selection of a process that has one mini-batch more; needs `process_group`."""
        for selection in self._selections:
            self.process_group.join_without_items(len(selection.counts), selection.counts[0])

    def _select(self, group) -> Selection:
        """Choose among the items of some losses, of all processes if there are process_group."""
        calls = [call for call, _ in group]
        total, samples = calls[0].losses.numel(), self._by_samples(calls[0])
        share = self.share(calls[0], total != self.batch_size)
        counts = [call.counts.where(call.finite, 0).sum() for call in calls]
        if self.process_group is not None:
            counts = self.process_group.sum(counts)
        scores, labelled, finite = self._scores(group, counts, samples)
        valid = labelled & finite
        own, start = len(scores), 0
        if self.process_group is not None:
            scores, start = self.process_group.union(scores.where(valid, -torch.inf))
            valid = scores > -torch.inf
        chosen = select_items(scores, self.keep, valid=valid, select=self.config.trim_select, generator=self.generator)
        self._log(scores, valid, chosen)
        kept = chosen if self.process_group is None else chosen[(chosen >= start) & (chosen < start + own)] - start
        if samples:
            self.samples = kept
        size = total // own
        elements = kept if size == 1 else (kept[:, None] * size + torch.arange(size, device=kept.device)).flatten()
        kept_counts = [call.counts[elements].sum() for call in calls]
        dropped, num_labelled = self.dropped, labelled.sum()
        if self.process_group is not None:
            more = [num_labelled.to(scores), scores.new_tensor(float(dropped))]
            *kept_counts, num_labelled, dropped = self.process_group.sum([*kept_counts, *more])
        if dropped and chosen.numel():  # the others stand in for what is missing, as they do in a mean
            planned = num_kept(self.keep, int(num_labelled))
            share = replace(share, items_per_kept=share.items_per_kept * planned / len(chosen))
        return Selection(kept, elements, counts, kept_counts, share)

    def _trimmed(self, group, selection: Selection) -> Tensor:
        """The trimmed sum of some losses over the same items."""
        first, _ = group[0]
        if not selection.kept.numel():
            return self._nothing(first)
        kept, elements = selection.kept, selection.elements
        if self._replays:  # the second forward pass has the kept ones alone
            kept = elements = torch.arange(first.losses.numel(), device=kept.device)
        terms = []
        for (call, weight), counts, kept_counts in zip(group, selection.counts, selection.kept_counts, strict=True):
            if call.reduction == "mean":
                factor = weight
            elif self._is_natural(call):
                factor = weight * selection.share.items_per_kept * kept_counts
            else:
                factor = weight * counts
            terms.append((call, torch.where(kept_counts > 0, factor / kept_counts, 0)))
        return self._take(terms, kept, elements, self._by_samples(first))

    def _by_samples(self, call: LossCall) -> bool:
        """Whether an item is a sample."""
        return call.losses.numel() == self.batch_size or self.config.trim_unit == "sample"

    def _nothing(self, call: LossCall) -> Tensor:
        """Zero, with a gradient of zero for each parameter, by the way of one item: engines wait for all of them."""
        usable = (call.finite & (call.counts > 0)).nonzero().flatten()[:1]
        if self.dropped or not usable.numel():
            return self.zero()
        sample = usable // max(1, call.losses.numel() // self.batch_size)
        return self._take([(call, call.losses.new_zeros(()))], sample, usable, self._by_samples(call))

    def _scores(self, group, all_counts, samples: bool) -> tuple[Tensor, Tensor, Tensor]:
        """What items are ranked by, which have a label, and which may be kept as far as NaN and infinity go."""
        scores, valid, finite = 0, False, True
        for (call, weight), counts in zip(group, all_counts, strict=True):
            losses, labelled, is_finite = call.losses.detach(), call.counts > 0, call.finite | (call.counts == 0)
            if samples and losses.numel() != self.batch_size:
                losses, labelled, is_finite = (self._by_sample(each) for each in (losses, labelled, is_finite))
                self._check_samples(labelled.sum(1), call.ignore_index)
                sample_counts = call.counts.view(labelled.shape).sum(1)
                losses = losses.where(labelled, 0).sum(1) / sample_counts.where(sample_counts > 0, 1)
                labelled, is_finite = labelled.any(1), is_finite.all(1)
            if call.reduction == "sum":
                weight = weight * (counts if self.num_items is None else self.num_items)
            scores, valid, finite = scores + weight * losses, valid | labelled, finite & is_finite
        return scores, valid, self._finite(finite)

    def _by_sample(self, values: Tensor) -> Tensor:
        if values.numel() % self.batch_size:
            raise self._mixed_up(values.numel())
        return values.view(self.batch_size, -1)

    def _check_samples(self, found: Tensor, ignore_index: int) -> None:
        """Some models leave out what has no label: then losses are not in the places of their labels."""
        if self.labels is None:
            return
        labelled = self.labels.to(found.device) != ignore_index
        if not any(torch.equal(found, each.flatten(1).sum(1)) for each in (labelled, labelled[..., 1:])):
            raise self._mixed_up(int(found.sum()))

    def _mixed_up(self, count: int) -> ValueError:
        return ValueError(
            f"The model has {count} losses for {self.batch_size} samples, and which belong to which is not known: use "
            "trim_unit='token' and trim_nonfinite='error'."
        )

    def _finite(self, finite: Tensor) -> Tensor:
        """Which items may be kept as far as NaN and infinity go: those of samples without them."""
        bad = int((~finite).sum())
        if not bad:
            return finite
        if self.config.trim_nonfinite == "error":
            raise ValueError(
                f"{bad} of {finite.numel()} losses of this mini-batch are NaN or infinite, and ranking them means "
                "nothing. Look at the data and the learning rate; trim_nonfinite='drop' leaves such samples out."
            )
        good = self._by_sample(finite).all(1)
        self.dropped += int((~good).sum())
        return good.repeat_interleave(finite.numel() // self.batch_size)

    def _take(self, terms, kept: Tensor, elements: Tensor, samples: bool) -> Tensor:
        """The weighted sum of the kept losses, with the backward pass that was asked for."""
        rows, dense_above = kept if samples else None, {}
        if self.dropped:  # whatever came before must not even see a zero gradient for them: 0 · NaN = NaN
            dense_above = {"dense_above": 1.0}
            if rows is None:
                rows = (elements // (terms[0][0].losses.numel() // self.batch_size)).unique()
        elif self.backward != "sparse":
            rows = None
        lazy = [(call, factor) for call, factor in terms if call.logits is not None]
        total = sum(
            factor * call.logits.sum_of(elements, rows, self.batch_size, **dense_above) for call, factor in lazy
        )
        weighted = [factor * call.losses for call, factor in terms if call.logits is None]
        if not weighted:
            return total
        losses = sum(weighted)
        if rows is None:
            return total + take_kept(losses, elements, "dense").sum()
        taken = take_rows_sparse(losses.view(self.batch_size, -1), rows, **dense_above)
        if not samples:
            taken = taken[torch.searchsorted(rows, elements // taken.shape[1]), elements % taken.shape[1]]
        return total + taken.sum()

    def _log(self, scores: Tensor, valid: Tensor, kept: Tensor) -> None:
        count = valid.sum()
        mean = scores.where(valid, 0).sum() / count
        if not kept.numel():
            return
        new = [scores.new_tensor(float(kept.numel())), count.to(scores), scores[kept].min(), mean]
        if self.logged is not None:
            kept_before, valid_before, threshold, mean_before = self.logged
            new = [new[0] + kept_before, new[1] + valid_before, threshold, mean + mean_before]
        self.logged = new


def step_share(keep: float, own: int, kept: int, valid: int) -> StepShare:
    """
    Args:
        keep (`float`): Fraction p to keep.
        own (`int`): Items of this mini-batch.
        kept (`int`): Items that the whole optimizer step keeps.
        valid (`int`): Items of the whole optimizer step.

    Returns:
        [`StepShare`]: What this mini-batch counts for.
    """
    return StepShare(num_kept(keep, own) / kept, own / valid, valid / kept) if kept else StepShare()
