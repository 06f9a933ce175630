"""
Step 3 (keep decision) of: batch → per-item losses → keep decision → trimmed backward → logs.

Which of a mini-batch's losses are kept. For example, B = 4 texts of T = 3 tokens, with losses `[4, 3]` of the tokens
and p = 0.5: 6 tokens are kept, `elements` are their `[6]` indices into the 12 losses. With `trim_unit="sample"` the
losses are averaged over each text, `[4]`, 2 texts are kept, and `elements` are the `[6]` indices of all their tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from hf_trim.backward import waiting
from hf_trim.backward.eager.rows import Rows
from hf_trim.backward.eager.sparse import DENSE_ABOVE, prepare_rows
from hf_trim.trainer.arguments import TrimmingConfig
from hf_trim.trainer.kept import Kept
from hf_trim.trainer.late_checks import LateChecks
from hf_trim.trainer.losses import IGNORE_INDEX, NO_PART, LossCall
from hf_trim.trainer.process_group import ProcessGroup
from hf_trim.trainer.ranking import (
    NONFINITE_ADVICE,
    Items,
    Track,
    check_samples,
    groups_of,
    items_of,
    total_weight,
    unknown_samples,
)
from hf_trim.trainer.sample_losses import SampleLosses
from hf_trim.trainer.second_pass import adopt
from hf_trim.trainer.selection import num_carrying, num_kept, places, top_mask, without_hardest


@dataclass
class TrimmedBatch:
    """
    The calls of loss functions in a mini-batch, and the choice among their items.

    Args:
        config ([`~hf_trim.trainer.arguments.TrimmingConfig`]): What is trimmed, and how.
        keep (`float`): Fraction p to keep.
        batch_size (`int`): Number B of samples.
        sparse (`bool`): Whether the backward pass is row-sparse where samples are kept.
        generator (`torch.Generator`, *optional*): Source of random subsets.
        labels (`torch.Tensor`, *optional*): `[B, ...]` labels, to verify which losses belong to which sample.
        process_group ([`~hf_trim.trainer.process_group.ProcessGroup`], *optional*): The processes that choose the
            hardest items together; without, this process chooses among its own.
        mean_masses (`list`): For each group of items that are ranked together, their mean mass in the training so far.
        checks ([`~hf_trim.trainer.late_checks.LateChecks`]): Raises errors, as soon as the host need not wait for it.
    """

    config: TrimmingConfig
    keep: float
    batch_size: int
    sparse: bool
    generator: torch.Generator | None = None
    labels: Tensor | None = None
    process_group: ProcessGroup | None = None
    mean_masses: Sequence[float | Tensor] = ()
    checks: LateChecks = field(default_factory=LateChecks)

    def __post_init__(self) -> None:
        self.calls: list[LossCall] = []
        self.scored: list[LossCall] | None = None  # in the second pass of a replay: the calls of the first one
        self.is_scoring = False  # whether that pass is under way
        self.is_in_model = False  # whether a replay is in the model's forward pass, which has no graph in the first
        self.samples: Tensor | None = None  # `[k]` indices of the kept samples, if items are samples
        self.per_sample: bool | None = None  # whether they are
        self.overflows: Tensor | int = 0  # losses that are not finite, where a gradient scaler skips the step
        self.dropped = 0  # number of samples left out because their losses are not finite
        self.most_items = 0  # among how many items the choice was, at most
        self.has_unknown_weights = False  # whether a replay adds up several losses of the model as they are
        self.logged: Tensor | None = None  # `[5]`: numbers of kept and of valid items, threshold, kept mass, mass
        self.masses: list[Tensor] = []  # of each group of items: `[2]`, the mass of one's own and their number
        # What is seen of each sample, if it is to be remembered.
        self.seen = SampleLosses(self.batch_size, self.labels, self.checks) if self.config.remembers else None
        self._values: list[Tensor] = []  # what the calls returned, until the choice is made
        self._joined: list[int] = []  # of each choice together with other processes, how many numbers of an item

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is left out."""
        return self.keep == 1 and not (self.config.is_adaptive and self.config.trims)

    @property
    def counts_all(self) -> bool:
        """Whether a mean is divided by the number of all items. The items with little mass have hardly a gradient."""
        return self.config.is_adaptive and self.config.trim_select == "hardest"

    @property
    def is_bounded_by_labels(self) -> bool:
        """Whether no loss has more items with a label than the mini-batch has labels. The host waits for it."""
        if self.labels is None:
            return False
        most = int(self.labels.ne(IGNORE_INDEX).sum())
        return all(int(call.labelled.sum()) <= most for call in self.calls)

    def if_plain(self, plain: Tensor) -> Tensor | None:
        """
        Args:
            plain (`torch.Tensor`): What a loss function has returned, where everything is kept.

        Returns:
            `torch.Tensor` or `None`: The same if it can be the loss: if there is no NaN, which may mean that there is
            no label. Where the host would wait to see it, [`LossCall`] and [`select`] find what is wrong.
        """
        if not self.config.trims:  # remembered as it is
            return plain
        can_wait = self.config.trim_nonfinite == "drop" or self.checks.is_first
        if not (can_wait or waiting.reads_freely(plain.device)):
            return plain
        return plain if plain.isfinite().all() else None

    # ---- calls ----------------------------------------------------------------------------------------------------

    def add(self, call: LossCall) -> Tensor:
        """
        Args:
            call ([`~hf_trim.trainer.losses.LossCall`]): A call of a loss function.

        Returns:
            `torch.Tensor`: What it returns to the caller.
        """
        if self.scored is not None:
            adopt(call, self.scored)
        value = call.value(self.is_scoring)
        self.calls.append(call)
        self._values.append(value)
        return value.clone()  # which may be changed in place

    @property
    def is_recording(self) -> bool:
        """Whether calls count that are made now: not those that are computed without a graph."""
        return torch.is_grad_enabled() or self.is_in_model and self.is_scoring

    @property
    def num_calls(self) -> int:
        """Number of calls so far."""
        return len(self.calls)

    def forget_calls(self, number: int) -> None:
        """Take back the calls after the first `number`."""
        del self.calls[number:], self._values[number:]

    def add_model_loss(self, loss: Tensor, first: int) -> Tensor:
        """
        In the first pass of a replay, in which the model has no graph: find the weight of its loss all the same.

        Args:
            loss (`torch.Tensor`): The scalar loss that the model returned.
            first (`int`): The number of the first call that it is made of.

        Returns:
            `torch.Tensor`: The loss, on which the trainer goes on to compute.
        """
        self.has_unknown_weights = self.has_unknown_weights or len(self._values) - first > 1
        leaf = loss.detach().clone().requires_grad_()
        self._values[first:] = [leaf] * (len(self._values) - first)
        return leaf.clone()

    def begin_replay(self) -> Tensor | None:
        """
        Begin the second forward pass of a replay. The first, without gradients, has chosen the samples.

        Returns:
            `torch.Tensor`: `[k]` indices of the samples to run; `None` if items are not samples, so that all are to be
            run.
        """
        scored, self.calls, self.is_scoring = self.calls, [], False
        if not self.per_sample or self.samples is None:
            self.logged, self.masses, self.dropped = None, [], 0  # all is done again
            self.seen = SampleLosses(self.batch_size, self.labels, self.checks) if self.seen is not None else None
            return None
        self.scored = scored
        # Without a valid item the first sample is run, so that there is a graph.
        return self.samples if self.samples.numel() else self.samples.new_zeros(1)

    def leave_out(self, loss: Tensor, zero: Tensor) -> Tensor:
        """
        Keep nothing of the mini-batch.

        Args:
            loss (`torch.Tensor`): Its scalar loss.
            zero (`torch.Tensor`): A zero whose gradient is zero for each parameter.

        Returns:
            `torch.Tensor`: The loss, with that gradient.
        """
        call = LossCall(zero[None], zero.new_ones(1), "sum", 1)
        call.full, call.kept = loss.detach(), Kept(zero.new_zeros(0, dtype=torch.long), zero.new_zeros(()))
        self.scored = None
        return self.add(call)

    def skip_scored(self) -> None:
        """In the second pass of a replay: a call without a graph, which the first pass could not tell from others."""
        if self.scored and self.is_in_model:
            del self.scored[0]

    def rank_by(self, score: Callable[[Tensor], Tensor]) -> None:
        """
        Rank the items by something else than their losses.

        Args:
            score (`Callable`): The losses of a call, `[B]` or `[B, T]`, to their scores.
        """
        if not self.keeps_all:
            for call in self.calls:
                if call.kept is None:
                    call.rank_by(score, self.config.trim_unit == "sample", self.checks)

    # ---- the choice -----------------------------------------------------------------------------------------------

    def select(self, loss: Tensor) -> None:
        """
        Choose what is kept of the calls.

        Args:
            loss (`torch.Tensor`): The batch's scalar loss, made of what the calls returned.

        Raises:
            `ValueError`: If the loss depends on no call, or an item cannot be ranked.
        """
        pending = [
            (call, value)
            for call, value in zip(self.calls, self._values, strict=True)
            if call.kept is None and (value.requires_grad or self.is_scoring)
        ]
        weights: dict[int, Tensor | None] = {id(value): value.new_ones(()) for _, value in pending}
        if len(weights) > 1 and loss.requires_grad and loss.dim() == 0:
            values = list({id(value): value for _, value in pending if value.requires_grad}.values())
            found = torch.autograd.grad(loss, values, retain_graph=True, allow_unused=True)
            weights |= {id(value): weight for value, weight in zip(values, found, strict=True)}
        # Calls without a weight computed metrics.
        used = [
            (call, total_weight(call, weight.detach()))
            for call, value in pending
            if (weight := weights[id(value)]) is not None
        ]
        if pending and not used:
            raise ValueError(NO_PART)
        for tracks in self._groups(used) if used else ():
            self._select(tracks)
        self._values = []  # they hold the graph
        if not self.is_scoring:
            self.calls = [call for call in self.calls if call.kept is not None]

    def _is_per_sample(self, call: LossCall) -> bool:
        rows, length = call.losses.shape
        if self.config.trim_unit == "sample" and rows > self.batch_size:
            raise ValueError(unknown_samples(self.batch_size).format(count=rows))
        return rows == self.batch_size and (length == 1 or self.config.trim_unit == "sample")

    def _groups(self, calls: Track) -> list[list[Track]]:
        """The calls, sorted by what they are over: groups that are ranked together, of calls over the same items."""
        groups = groups_of(calls, self._is_per_sample)
        self.per_sample = all(self._is_per_sample(call) for call, _ in calls)
        has_label_per_sample = self.labels is None or self.labels.numel() == self.batch_size
        if self.config.trim_unit == "token" and self.per_sample and has_label_per_sample:
            raise ValueError(
                "trim_unit='token' needs a loss per token, and this model has one per sample: use trim_unit='auto' or "
                "'sample'."
            )
        return groups

    def _select(self, tracks: list[Track]) -> None:
        """Choose among the items of some calls, together with the other processes if there is a process group."""
        ranked = [self._items(track) for track in tracks]
        items, most = Items.joined(ranked), sum(self._most_valid(track) for track in tracks)
        own_mass, start, number = items.mass.where(items.valid, 0), 0, len(self.masses)
        items = items._replace(mass=own_mass)
        self.masses.append(torch.stack([own_mass.sum(), items.valid.sum().to(own_mass)]))
        if self.process_group is not None:
            items, start = self._union(self.process_group, items)  # the items of this process begin at `start`
            most = len(items.scores)
        self.most_items = max(self.most_items, len(items.scores))
        chosen, rest, most = self.choose(items.scores, items.mass, items.valid, most, number)
        own = chosen[start : start + len(own_mass)]
        self._note_for_logs(items, chosen, own_mass, own)
        counts, divisors = items.counts.sum(0), items.counts.where((rest if self.counts_all else chosen)[:, None], 0)
        kept: list[tuple[LossCall, Kept]] = []
        for track, part in zip(tracks, own.split([len(x.scores) for x in ranked]), strict=True):
            kept += self._kept(track, part, most)
            if self.seen is not None:
                self.seen.add(track, part)
        processes = 1 if self.process_group is None else self.process_group.size
        # Pieces of one loss have one number; other calls over the same items have one each.
        sums = zip(counts.expand(len(kept)), divisors.sum(0).expand(len(kept)), strict=True)
        rows = self._rows([call for call, _ in kept], kept[0][1].elements)
        for (call, part), (count, divisor) in zip(kept, sums, strict=True):
            # The engines average over the processes; a mean is over the items of all.
            whole = processes if call.reduction == "mean" else count * call.scale
            call.kept = part._replace(factor=torch.where(divisor > 0, whole / divisor, 0), rows=rows)

    def _items(self, track: Track) -> Items:
        """The items of some calls. Those of samples with NaN and infinity are no items, or refused."""
        call = track[0][0]
        is_per_sample = self._is_per_sample(call)
        if is_per_sample:
            for other, _ in track:
                if other.losses.shape[1] > 1:
                    check_samples(other, self.labels, self.batch_size, self.checks)
        elif call.most_labels < call.losses.numel():
            more = (call.labelled.sum() - call.most_labels).clamp(min=0)
            self.checks.refuse(
                more, "The loss of a mini-batch has {count} labels that its labels lack: set trim_backward='dense'."
            )
        items = items_of(track, is_per_sample)
        num_nonfinite, total = (~items.finite).sum(), items.finite.numel()
        if self.config.trim_nonfinite == "error" and self.config.trims:
            what = (
                f"{{count}} of {total} losses of this mini-batch are NaN or infinite, and ranking them means nothing."
            )
            self.checks.refuse(num_nonfinite, f"{what} {NONFINITE_ADVICE}", is_nonfinite=True)
            if self.checks.skips_nonfinite:
                self.overflows = self.overflows + num_nonfinite
                return items._replace(scores=items.scores.where(items.finite, torch.inf))
        elif self.config.trims and int(num_nonfinite):
            if len(call.losses) != self.batch_size:
                raise ValueError(unknown_samples(self.batch_size).format(count=total))
            finite = items.finite.view(self.batch_size, -1).all(1)
            self.dropped += int((~finite).sum())
            return items._replace(valid=items.valid & finite.repeat_interleave(total // self.batch_size))
        return items._replace(valid=items.valid & items.finite)

    def _most_valid(self, track: Track) -> int:
        """How many items can have a label, as far as the host knows."""
        call = track[0][0]
        return self.batch_size if self._is_per_sample(call) else call.most_labels

    def _union(self, process_group: ProcessGroup, items: Items) -> tuple[Items, int]:
        """The items of all processes, and where one's own begin: in one collective operation."""
        scores, mass = items.scores.where(items.valid, -torch.inf), items.mass
        own = torch.cat([scores[:, None], mass[:, None], items.counts], 1)
        self._joined.append(own.shape[1])
        union, start = process_group.union(own)
        scores, mass, counts = union[:, 0], union[:, 1], union[:, 2:]
        valid = scores > -torch.inf
        return Items(scores, mass, valid, valid, counts), start

    def choose(
        self, scores: Tensor, mass: Tensor, valid: Tensor, most: int, number: int = 0
    ) -> tuple[Tensor, Tensor, int]:
        """
        The items to keep.

        Args:
            scores (`torch.Tensor`): `[n]` losses of the items.
            mass (`torch.Tensor`): `[n]` gradient mass of the items.
            valid (`torch.Tensor`): `[n]`, which of them may be kept.
            most (`int`): How many may be kept at most.
            number (`int`, *optional*, defaults to 0): Which group of items it is.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, int]`: `[n]`, which are kept; `[n]`, which items they were chosen from:
            all but the hardest, if `trim_skip_hardest` leaves these out; and how many are kept at most, as far as the
            host knows.
        """
        config = self.config
        rest, ties = without_hardest(scores, valid, config.trim_skip_hardest), None
        if config.is_adaptive:
            mass, ties = mass.where(rest, 0), scores
            mean_mass = self.mean_masses[number] if number < len(self.mean_masses) else 0.0
            count, scores = num_carrying(mass, config.trim_mass, rest.sum().double() * mean_mass), mass
        else:
            count, most = num_kept(self.keep, waiting.number(valid.sum())), num_kept(self.keep, most)
        chosen = top_mask(scores, count, rest, ties=ties, select=config.trim_select, generator=self.generator)
        return chosen, rest, most

    def _kept(self, track: Track, chosen: Tensor, most: int) -> list[tuple[LossCall, Kept]]:
        """Of the calls over the same items, the losses of the `chosen` ones, of which there are `most` at most."""
        call = track[0][0]
        is_per_sample, is_free = self._is_per_sample(call), waiting.reads_freely(chosen.device)
        # Whether the backward pass costs what the items do: row-sparse, or the gradient of a head in chunks.
        is_lean = is_per_sample and self.sparse and call.plain is None or call.logits is not None
        # Then their number is worth a wait where it follows the losses, since its bound is that of all items. No
        # others may be among them where some are dropped: 0 · NaN = NaN. A replay's first pass decides what is run.
        follows_losses = is_lean and not self.keeps_all and (self.config.is_adaptive or self.process_group is not None)
        is_exact = is_free or self.is_scoring or self.dropped > 0 or follows_losses
        items = places(chosen, None if is_exact else most if is_lean else len(chosen))
        is_kept = None if is_free else chosen[items]
        if is_per_sample:
            self.samples = items
        kept = []
        for call, _ in track:
            length = call.losses.shape[1]
            elements, which = items, is_kept
            if is_per_sample and length > 1:  # samples 0 and 2 of 3 tokens each have the losses [0, 1, 2, 6, 7, 8]
                elements = (items[:, None] * length + torch.arange(length, device=items.device)).flatten()
                which = None if is_kept is None else is_kept.repeat_interleave(length)
            kept.append((call, Kept(elements, chosen.new_zeros(()), None, which)))
        return kept

    def _rows(self, calls: list[LossCall], elements: Tensor) -> Rows | None:
        """The kept samples of a group, if its backward pass is row-sparse."""
        call = calls[0]
        is_per_sample = self._is_per_sample(call)
        if self.is_scoring or call.plain is not None:
            return None
        dense_above, items = DENSE_ABOVE, self.samples
        if self.dropped:
            # A dropped sample must not get a gradient of zero either, since 0 · NaN = NaN. So the backward pass is
            # row-sparse, however many samples are kept.
            dense_above = 1.0
            items = items if is_per_sample else (elements // call.losses.shape[1]).unique()
        elif not (is_per_sample and self.sparse):
            return None
        sources = [call.losses if call.logits is None else call.logits.hidden for call in calls]
        return prepare_rows(sources, cast(Tensor, items), self.batch_size, dense_above)

    @property
    def has_no_graph(self) -> bool:
        """Whether nothing is kept and something was dropped: not even a gradient of zero may go into the model."""
        kept = [call.kept for call in self.calls if call.kept is not None]
        return bool(self.dropped) and not any(part.elements.numel() for part in kept)

    def join_without_items(self) -> None:
        """Take part in the choice of processes that have one mini-batch more; needs `process_group`."""
        assert self.process_group is not None
        for width in self._joined:
            self.process_group.union(torch.zeros(0, width, device=self.process_group.device))

    def _note_for_logs(self, items: Items, chosen: Tensor, mass: Tensor, own: Tensor) -> None:
        """Note what was `chosen` of the items of all processes that choose together, and the `mass` of one's own."""
        if (self.is_scoring or waiting.reads_freely(chosen.device)) and not chosen.any():
            return
        numbers = [chosen.sum(), items.valid.sum()]
        threshold = items.scores.where(chosen, torch.inf).min()
        noted = torch.stack([*(x.to(mass) for x in numbers), threshold, mass.where(own, 0).sum(), mass.sum()])
        if self.logged is not None:  # several kinds of items: threshold and mass are those of the first kind
            first = torch.where(self.logged[0] > 0, self.logged, noted)
            noted = torch.cat([self.logged[:2] + noted[:2], first[2:]])
        self.logged = noted
