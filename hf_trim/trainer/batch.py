"""
Step 3 (keep decision) of: batch → per-item losses → keep decision → trimmed backward → logs.

Which of a mini-batch's losses are kept. For example, B = 4 texts of T = 3 tokens, with losses `[4, 3]` of the tokens
and p = 0.5: 6 tokens are kept, `elements` are their `[6]` indices into the 12 losses. With `trim_unit="sample"` the
losses are averaged over each text, `[4]`, 2 texts are kept, and `elements` are the `[6]` indices of all their tokens.

A batch may have several calls of loss functions. What they are over decides which items are ranked together:

- losses that are one for each sample (start and end of an answer), or that have the same targets (a main and an
  auxiliary label map), belong to the same items. These are ranked by the sum, weighted as in the batch's loss;
- sums by the same function over different targets are pieces of one loss (a long text in chunks): one ranking;
- any others (tokens and pairs of sentences, two tasks of which each sample has one) are ranked separately.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_trim.backward.eager.rows import Rows
from hf_trim.backward.eager.sparse import DENSE_ABOVE, prepare_rows
from hf_trim.trainer.arguments import TrimmingConfig
from hf_trim.trainer.losses import NO_PART, Kept, LossCall
from hf_trim.trainer.process_group import ProcessGroup
from hf_trim.trainer.selection import num_carrying, num_kept, top_items, without_hardest


Track = list[tuple[LossCall, Tensor]]  # calls over the same items, and the weight of each


def _part(items: Tensor, start: int, size: int) -> Tensor:
    """Of indices into a joined list, those into one part of it: of (1, 4, 6) and the 2 from 3 on, (1,)."""
    return items[(items >= start) & (items < start + size)] - start


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
        mean_masses (`list[float]`): For each group of items that are ranked together, their mean mass in the training
            so far.
    """

    config: TrimmingConfig
    keep: float
    batch_size: int
    sparse: bool
    generator: torch.Generator | None = None
    labels: Tensor | None = None
    process_group: ProcessGroup | None = None
    mean_masses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.calls: list[LossCall] = []
        self.scored: list[LossCall] | None = None  # in the second pass of a replay: the calls of the first one
        self.is_scoring = False  # whether that pass is under way
        self.is_in_model = False  # whether a replay is in the model's forward pass, which has no graph in the first
        self.samples: Tensor | None = None  # `[k]` indices of the kept samples, if items are samples
        self.per_sample: bool | None = None  # whether they are
        self.dropped = 0  # number of samples left out because their losses are not finite
        self.most_items = 0  # among how many items the choice was, at most
        self.has_unknown_weights = False  # whether a replay adds up several losses of the model as they are
        self.logged: list[Tensor] | None = None  # numbers of kept and of valid items, threshold, mass
        self.masses: list[Tensor] = []  # of each group of items: `[2]`, the mass of one's own and their number
        self._values: list[Tensor] = []  # what the calls returned, until the choice is made
        self._joined: list[int] = []  # of each choice together with other processes, the number of calls

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is left out."""
        return self.keep == 1 and not self.config.is_adaptive

    @property
    def counts_all(self) -> bool:
        """Whether a mean is divided by the number of all items. The items with little mass have hardly a gradient."""
        return self.config.is_adaptive and self.config.trim_select == "hardest"

    # ---- calls ----------------------------------------------------------------------------------------------------

    def add(self, call: LossCall) -> Tensor:
        """
        Args:
            call ([`~hf_trim.trainer.losses.LossCall`]): A call of a loss function.

        Returns:
            `torch.Tensor`: What it returns to the caller.
        """
        if self.scored is not None:
            self._adopt(call, self.scored)
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
        call.full, call.kept = loss.detach(), Kept(zero.new_zeros(0, dtype=torch.long), zero.new_zeros(()), None)
        self.scored = None
        return self.add(call)

    def skip_scored(self) -> None:
        """In the second pass of a replay: a call without a graph, which the first pass could not tell from others."""
        if self.scored and self.is_in_model:
            del self.scored[0]

    @staticmethod
    def _adopt(call: LossCall, calls: list[LossCall]) -> None:
        """In the second pass of a replay: what the first one has chosen of the same call."""
        while calls and (calls[0].kind, calls[0].reduction) != (call.kind, call.reduction):
            del calls[0]
        if not calls:
            raise ValueError(
                "compute_loss calls other loss functions when it is run a second time, or over other classes (as "
                "where samples are compared with each other): set trim_backward='sparse'."
            )
        scored = calls.pop(0)
        if scored.kept is None:  # the loss does not depend on it
            call.kept = Kept(torch.zeros(0, dtype=torch.long), torch.zeros(()), None)
            call.is_unknown = True
            return
        elements, factor, _ = scored.kept
        if call.losses.numel() != scored.losses.numel():  # the model has run the kept samples alone
            if call.reduction == "none":
                raise ValueError("mark_losses in a model's forward pass cannot go with trim_backward='replay'.")
            count = call.losses.numel() if elements.numel() else 0
            elements, call.full = torch.arange(count, device=elements.device), scored.full
        call.kept = Kept(elements, factor, None)

    def rank_by(self, score: Callable[[Tensor], Tensor]) -> None:
        """
        Rank the items by something else than their losses.

        Args:
            score (`Callable`): The losses of a call, `[B]` or `[B, T]`, to their scores.
        """
        if not self.keeps_all:
            for call in self.calls:
                if call.kept is None:
                    call.rank_by(score, self.config.trim_unit == "sample")

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
            (call, self._total_weight(call, weight.detach()))
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

    @staticmethod
    def _total_weight(call: LossCall, weight: Tensor) -> Tensor:
        """The weight of all losses of a call together, from that of its value."""
        if call.reduction == "mean" or weight.dim():
            return weight.sum()
        return weight * call.scale * call.losses.numel()

    def _is_per_sample(self, call: LossCall) -> bool:
        rows, length = call.losses.shape
        if self.config.trim_unit == "sample" and rows > self.batch_size:
            raise self._unknown_samples(rows)
        return rows == self.batch_size and (length == 1 or self.config.trim_unit == "sample")

    def _groups(self, calls: Track) -> list[list[Track]]:
        """The calls, sorted by what they are over: groups that are ranked together, of calls over the same items."""
        tracks: dict[tuple, Track] = {}
        for number, (call, weight) in enumerate(calls):
            target = call.target
            if self._is_per_sample(call):
                key: tuple = ("samples",)
            elif target is None:
                key = (number,)
            else:
                key = (target.data_ptr(), target.shape, target.stride(), call.losses.numel())
            tracks.setdefault(key, []).append((call, weight))
        self.per_sample = all(key == ("samples",) for key in tracks)
        has_label_per_sample = self.labels is None or self.labels.numel() == self.batch_size
        if self.config.trim_unit == "token" and self.per_sample and tracks and has_label_per_sample:
            raise ValueError(
                "trim_unit='token' needs a loss per token, and this model has one per sample: use trim_unit='auto' or "
                "'sample'."
            )
        groups: dict[tuple, list[Track]] = {}
        for key, track in tracks.items():
            is_piece = len(track) == 1 and track[0][0].reduction == "sum" and key != ("samples",)
            groups.setdefault(track[0][0].kind if is_piece else (key,), []).append(track)
        return list(groups.values())

    def _select(self, tracks: list[Track]) -> None:
        """Choose among the items of some calls, together with the other processes if there is a process group."""
        ranked = [self._scores(track) for track in tracks]
        sizes = [len(scores) for scores, _, _ in ranked]
        scores, mass, valid = (torch.cat(x) for x in zip(*ranked, strict=True))
        own_mass, start = mass.where(valid, 0), 0  # the items of this process begin at `start`
        mass, number = own_mass, len(self.masses)
        self.masses.append(torch.stack([mass.sum(), valid.sum().to(mass)]))
        if self.process_group is not None:
            if self.config.is_adaptive:  # or the mass decides nothing, and is not sent around
                mass, _ = self.process_group.union(mass)
            scores, start = self.process_group.union(scores.where(valid, -torch.inf))
            valid = scores > -torch.inf
        self.most_items = max(self.most_items, len(scores))
        chosen, rest = self.choose(scores, mass, valid, number)
        self._note_for_logs(scores, valid, chosen, own_mass, _part(chosen, start, len(own_mass)))
        divided = rest.nonzero().flatten() if self.counts_all else chosen
        kept: list[tuple[LossCall, Tensor, Tensor]] = []
        divisors: list[Tensor] = []
        for track, size in zip(tracks, sizes, strict=True):
            items, counted = _part(chosen, start, size), _part(divided, start, size)
            start += size
            kept += [(call, items, self._elements(call, items)) for call, _ in track]
            divisors += [call.counts.flatten()[self._elements(call, counted)].sum() for call, _ in track]
        self._keep(kept, divisors, is_pooled=len(tracks) > 1)

    def choose(self, scores: Tensor, mass: Tensor, valid: Tensor, number: int = 0) -> tuple[Tensor, Tensor]:
        """
        The items to keep.

        Args:
            scores (`torch.Tensor`): `[n]` losses of the items.
            mass (`torch.Tensor`): `[n]` gradient mass of the items.
            valid (`torch.Tensor`): `[n]`, which of them may be kept.
            number (`int`, *optional*, defaults to 0): Which group of items it is.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: `[k]` ascending indices, and `[n]`, which items they were chosen from:
            all but the hardest, if `trim_skip_hardest` leaves these out.
        """
        config = self.config
        rest, ties = without_hardest(scores, valid, config.trim_skip_hardest), None
        if config.is_adaptive:
            mass, ties = mass.where(rest, 0), scores
            mean_mass = self.mean_masses[number] if number < len(self.mean_masses) else 0.0
            count, scores = num_carrying(mass, config.trim_mass, mean_mass * int(rest.sum())), mass
        else:
            count = num_kept(self.keep, int(valid.sum()))
        select = config.trim_select
        return top_items(scores, count, ties=ties, valid=rest, select=select, generator=self.generator), rest

    def _elements(self, call: LossCall, items: Tensor) -> Tensor:
        """The losses of the kept items: samples 0 and 2 of 3 tokens each have [0, 1, 2, 6, 7, 8]."""
        length = call.losses.shape[1]
        if not self._is_per_sample(call) or length == 1:
            return items
        return (items[:, None] * length + torch.arange(length, device=items.device)).flatten()

    def _keep(self, kept: list[tuple[LossCall, Tensor, Tensor]], divisors: list[Tensor], is_pooled: bool) -> None:
        """Note what is kept of the calls in a group, and what each kept loss counts for: a mean has these divisors."""
        counts = [call.counts.sum() for call, _, _ in kept]
        processes = 1
        if self.process_group is not None:
            self._joined.append(len(kept))
            processes = self.process_group.size
            sums = self.process_group.sum(counts + divisors)
            counts, divisors = sums[: len(kept)], sums[len(kept) :]
        if is_pooled:
            counts, divisors = [sum(counts)] * len(kept), [sum(divisors)] * len(kept)  # type: ignore[list-item]
        rows = self._rows(kept)
        for (call, _, elements), count, divisor in zip(kept, counts, divisors, strict=True):
            # The engines average over the processes; a mean is over the items of all.
            whole = processes if call.reduction == "mean" else count * call.scale
            call.kept = Kept(elements, torch.where(divisor > 0, whole / divisor, 0), rows)

    def _rows(self, kept: list[tuple[LossCall, Tensor, Tensor]]) -> Rows | None:
        """The kept samples of a group, if its backward pass is row-sparse."""
        call, items, elements = kept[0]
        is_per_sample = self._is_per_sample(call)
        if is_per_sample:
            self.samples = items
        if self.is_scoring or call.plain is not None:
            return None
        dense_above = DENSE_ABOVE
        if self.dropped:
            # A dropped sample must not get a gradient of zero either, since 0 · NaN = NaN. So the backward pass is
            # row-sparse, however many samples are kept.
            dense_above = 1.0
            items = items if is_per_sample else (elements // call.losses.shape[1]).unique()
        elif not (is_per_sample and self.sparse):
            return None
        sources = [call.losses if call.logits is None else call.logits.hidden for call, _, _ in kept]
        return prepare_rows(sources, items, self.batch_size, dense_above)

    @property
    def has_no_graph(self) -> bool:
        """Whether nothing is kept and something was dropped: not even a gradient of zero may go into the model."""
        kept = [call.kept for call in self.calls if call.kept is not None]
        return bool(self.dropped) and not any(part.elements.numel() for part in kept)

    def join_without_items(self) -> None:
        """Take part in the choice of processes that have one mini-batch more; needs `process_group`."""
        assert self.process_group is not None
        for num_calls in self._joined:
            self.process_group.join_without_items(num_calls, num_unions=2 if self.config.is_adaptive else 1)

    # ---- scores ---------------------------------------------------------------------------------------------------

    def _scores(self, track: Track) -> tuple[Tensor, Tensor, Tensor]:
        """For each item: its loss and its gradient mass, weighted over the calls, and whether it may be kept."""
        total = torch.stack([weight for _, weight in track]).abs().sum()
        scores: list[Tensor] = []
        masses: list[Tensor] = []
        labelled: list[Tensor] = []
        finite: list[Tensor] = []
        for call, weight in track:
            share = torch.where(total != 0, weight / total, 1 / len(track))
            rank, is_labelled, is_finite = call.scores, call.labelled, call.finite | ~call.labelled
            mass = call.mass()
            if self._is_per_sample(call) and call.losses.shape[1] > 1:
                self._check_samples(call)
                counts = call.counts.sum(1)
                counts = counts.where(counts != 0, 1)
                rank, mass = rank.where(is_labelled, 0).sum(1) / counts, mass.sum(1) / counts
                is_labelled, is_finite = is_labelled.any(1), is_finite.all(1)
            scores.append(share * rank.flatten())
            masses.append(share.abs() * mass.flatten())
            labelled.append(is_labelled.flatten())
            finite.append(is_finite.flatten())
        may_be_kept: Tensor = self._finite(torch.stack(finite).all(0), track[0][0])
        valid = torch.stack(labelled).any(0) & may_be_kept
        return torch.stack(scores).sum(0), torch.stack(masses).sum(0), valid

    def _check_samples(self, call: LossCall) -> None:
        """
        Check that each sample has as many losses as labels. Some models leave out what has no label, so that losses
        are not in the places of their labels.
        """
        if self.labels is None or self.labels.dim() < 2 or call.ignore_index is None:
            return
        num_losses = call.labelled.sum(1)
        labelled: Tensor = self.labels.to(call.losses.device).ne(call.ignore_index)
        if not any(torch.equal(num_losses, x.flatten(1).sum(1)) for x in (labelled, labelled[..., 1:])):
            raise self._unknown_samples(int(num_losses.sum()))
        if call.target is not None and call.target.numel() == call.losses.numel():
            turned = call.target.reshape(call.losses.shape[::-1]).t()  # [T, B] → [B, T]
            rows = call.target.reshape(call.losses.shape)
            for expected in (self.labels, self.labels[..., 1:]):
                if torch.equal(turned, expected) and not torch.equal(rows, expected):
                    raise self._unknown_samples(int(num_losses.sum()))

    def _unknown_samples(self, count: int) -> ValueError:
        return ValueError(
            f"The model has {count} losses for {self.batch_size} samples, and which belong to which is not known: use "
            "trim_unit='token' and trim_nonfinite='error'."
        )

    def _finite(self, finite: Tensor, call: LossCall) -> Tensor:
        """Which items may be kept: those of samples without NaN and infinity. Others are dropped, or refused."""
        num_nonfinite = int((~finite).sum())
        if not num_nonfinite:
            return finite
        if self.config.trim_nonfinite == "error":
            raise ValueError(
                f"{num_nonfinite} of {finite.numel()} losses of this mini-batch are NaN or infinite, and ranking them "
                "means nothing. Look at the data and the learning rate; trim_nonfinite='drop' leaves such samples "
                "out."
            )
        if len(call.losses) != self.batch_size:
            raise self._unknown_samples(finite.numel())
        finite_samples = finite.view(self.batch_size, -1).all(1)
        self.dropped += int((~finite_samples).sum())
        return finite_samples.repeat_interleave(finite.numel() // self.batch_size)

    def _note_for_logs(self, scores: Tensor, valid: Tensor, kept: Tensor, mass: Tensor, own: Tensor) -> None:
        """Note what was `kept` of the items of all processes that choose together, and the `mass` of one's own."""
        if not kept.numel():
            return
        numbers = [scores.new_tensor(float(kept.numel())), valid.sum().to(scores)]
        if self.logged is None:
            self.logged = [*numbers, scores[kept].min(), mass[own].sum(), mass.sum()]
        else:  # several kinds of items: threshold and mass are those of the first kind
            self.logged[:2] = [x + y for x, y in zip(self.logged, numbers, strict=False)]
