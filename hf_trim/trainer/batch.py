"""
Step 3 (keep decision) of: batch → per-item losses → keep decision → trimmed backward → logs.

The losses of one mini-batch become the scalar loss of the items to keep. For example, B = 4 texts of T = 3 tokens,
with losses `[12]` of the tokens and p = 0.5: 6 tokens are kept, `elements` are their `[6]` indices into the losses.
With `trim_unit="sample"` the losses are averaged over each text, `[4]`, 2 texts are kept, and `elements` are the `[6]`
indices of all their tokens. The loss that the model computed is then corrected: the mean over the kept losses comes in
the place of the mean over all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_trim.backward import take_kept
from hf_trim.backward.eager.sparse import take_rows_sparse
from hf_trim.trainer.arguments import TrimmingConfig
from hf_trim.trainer.heads import PASS_A_LOSS
from hf_trim.trainer.losses import LossCall
from hf_trim.trainer.process_group import ProcessGroup
from hf_trim.trainer.selection import num_kept, select_items
from hf_trim.trainer.step_share import StepShare


@dataclass
class Selection:
    """
    What is kept of some losses over the same items, and what that counts for.

    Args:
        kept (`torch.Tensor`): `[k]` indices of the kept items of this process.
        elements (`torch.Tensor`): Indices of their losses: those of the items, or of all tokens of the kept samples.
        counts (`list[torch.Tensor]`): For each call of a loss function, the sum of its counts over all items, of all
            processes among whose items the hardest were chosen.
        kept_counts (`list[torch.Tensor]`): The same sum over the kept items.
        share ([`~hf_trim.trainer.step_share.StepShare`]): What the mini-batch counts for in its optimizer step.
    """

    kept: Tensor
    elements: Tensor
    counts: list[Tensor]
    kept_counts: list[Tensor]
    share: StepShare


@dataclass
class TrimmedBatch:
    """
    Turns the loss of a whole mini-batch into that of the items to keep.

    Losses over the same items (start and end of an answer, a main and an auxiliary label map) are ranked by their sum,
    weighted as in the model's loss. Losses over different items (tokens and pairs of sentences) are ranked separately.
    Other terms of the model's loss, such as the load balance of a mixture of experts, stay as they are.

    Args:
        config ([`~hf_trim.trainer.arguments.TrimmingConfig`]): What is trimmed, and how.
        keep (`float`): Fraction p to keep.
        backward (`str`): `"dense"`, `"sparse"` or `"replay"`.
        batch_size (`int`): Number B of samples.
        share (`Callable`): `f(call, per_token)` → the [`~hf_trim.trainer.step_share.StepShare`] of this mini-batch.
        zero (`Callable`): Returns a zero whose gradient is zero for each parameter, for a mini-batch without items.
        generator (`torch.Generator`, *optional*): Source of random subsets.
        num_items (`torch.Tensor` or `int`, *optional*): Number of labels that the model divides by, if it does.
        mean_scale (`float`, *optional*, defaults to 1.0): Factor of losses that are means.
        labels (`torch.Tensor`, *optional*): `[B, ...]` labels, to verify which losses belong to which sample.
        process_group ([`~hf_trim.trainer.process_group.ProcessGroup`], *optional*): The processes that choose the
            hardest items together; without, this process chooses among its own.
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

    def __post_init__(self) -> None:
        self.samples: Tensor | None = None  # `[k]` indices of the kept samples, once chosen, if items are samples
        self.dropped = 0  # number of samples left out because their losses are not finite
        self.logged: list[Tensor] | None = None  # numbers of kept and valid items, threshold, mean over all
        self._selections: list[Selection] | None = None  # made in the first forward pass, one for each kind of item
        self._is_replay = False  # whether the second forward pass, on the kept samples alone, is under way

    def __call__(self, loss: Tensor, calls: list[LossCall]) -> Tensor:
        """
        Trim the loss of the mini-batch.

        Args:
            loss (`torch.Tensor`): The model's scalar loss, computed from the values of the calls.
            calls (`list` of [`~hf_trim.trainer.losses.LossCall`]): The calls of loss functions in the forward pass.

        Returns:
            `torch.Tensor`: The scalar loss to train with. If the loss is a mean, it is this mini-batch's share of the
            mean over its optimizer step; if it is a sum, the sum over the kept items, scaled up to all items.

        Raises:
            `ValueError`: If the loss depends on no call, or not linearly.
        """
        weights: Sequence[Tensor | None]
        if loss.requires_grad:
            calls = [call for call in calls if call.value.requires_grad]  # the other calls computed metrics
            # The weight of each mean in the model's loss, 0.5 for the start and the end of an answer.
            values = [call.value for call in calls]
            weights = torch.autograd.grad(loss, values, create_graph=True, allow_unused=True)
            if any(weight is not None and weight.requires_grad for weight in weights):
                raise ValueError(
                    "The model's loss is no linear function of the means that torch's loss functions gave it, and "
                    f"cannot be trimmed by itself. {PASS_A_LOSS}"
                )
        else:  # the forward pass only scores the items
            weights = [torch.ones_like(call.value) for call in calls]
        used = [(call, weight.detach()) for call, weight in zip(calls, weights, strict=True) if weight is not None]
        if not used:
            raise ValueError(
                f"The model's loss does not depend on any call of a loss function of torch. {PASS_A_LOSS}"
            )
        groups: dict[int, list[tuple[LossCall, Tensor]]] = {}
        for call, weight in used:
            groups.setdefault(call.losses.numel(), []).append((call, weight))
        self._selections = self._selections or []
        for index, group in enumerate(groups.values()):
            if not self._is_replay:
                self._selections.append(self._select(group))
            untrimmed = sum(weight * call.value.detach() for call, weight in group)
            loss = loss + (self._trimmed_sum(group, self._selections[index]) - untrimmed).to(loss.dtype)
        if all(call.reduction == "sum" for call, _ in used):
            return loss
        # If a mean over tokens is trimmed by samples, the number of tokens that the step keeps is not known before all
        # its mini-batches are run. The share of all tokens stands in for it.
        share = self._selections[0].share
        return loss * self.mean_scale * (share.kept if self._has_loss_per_item(used[0][0]) else share.valid)

    @property
    def is_done(self) -> bool:
        """Whether there was a loss to trim."""
        return self._selections is not None

    def begin_replay(self) -> Tensor:
        """
        Begin the second forward pass of a replay. The first, without gradients, has chosen the samples.

        Returns:
            `torch.Tensor`: `[k]` indices of the samples to run.
        """
        assert self.samples is not None  # the first forward pass has chosen them
        # Without a valid item the first sample is run, so that there is a graph.
        kept = self.samples if self.samples.numel() else self.samples.new_zeros(1)
        self.batch_size, self._is_replay = len(kept), True
        return kept

    def join_without_items(self) -> None:
        """Take part in the selection of processes that have one mini-batch more; needs `process_group`."""
        assert self._selections is not None and self.process_group is not None
        for selection in self._selections:
            self.process_group.join_without_items(len(selection.counts), selection.counts[0])

    def _has_loss_per_item(self, call: LossCall) -> bool:
        """Whether the loss function has one loss for each item; if not, items are samples of several tokens."""
        return call.losses.numel() == self.batch_size or self.config.trim_unit != "sample"

    def _items_are_samples(self, call: LossCall) -> bool:
        return call.losses.numel() == self.batch_size or self.config.trim_unit == "sample"

    def _select(self, group) -> Selection:
        """Choose among the items of some losses, together with the other processes if there is a process group."""
        calls = [call for call, _ in group]
        total, samples = calls[0].losses.numel(), self._items_are_samples(calls[0])
        share = self.share(calls[0], total != self.batch_size)
        counts = [call.counts.where(call.finite, 0).sum() for call in calls]
        if self.process_group is not None:
            counts = self.process_group.sum(counts)
        scores, labelled, finite = self._scores(group, counts, samples)
        valid = labelled & finite
        num_own, start = len(scores), 0  # this process has the items from `start` to `start + num_own`
        if self.process_group is not None:
            scores, start = self.process_group.union(scores.where(valid, -torch.inf))
            valid = scores > -torch.inf
        chosen = select_items(scores, self.keep, valid=valid, select=self.config.trim_select, generator=self.generator)
        self._note_for_logs(scores, valid, chosen)
        kept = chosen if self.process_group is None else chosen[(chosen >= start) & (chosen < start + num_own)] - start
        if samples:
            self.samples = kept
        tokens = total // num_own  # 1 where items are tokens, or samples with one loss
        elements = kept
        if tokens > 1:  # samples 0 and 2 of 3 tokens each: [0, 1, 2, 6, 7, 8]
            elements = (kept[:, None] * tokens + torch.arange(tokens, device=kept.device)).flatten()
        kept_counts = [call.counts[elements].sum() for call in calls]
        num_labelled = labelled.sum()
        dropped: Tensor | int = self.dropped
        if self.process_group is not None:
            own = [*kept_counts, num_labelled.to(scores), scores.new_tensor(float(dropped))]
            *kept_counts, num_labelled, dropped = self.process_group.sum(own)
        if dropped and chosen.numel():
            # Fewer items are kept than the labels promised: each counts for more, as in a mean over fewer items.
            planned = num_kept(self.keep, int(num_labelled))
            share = replace(share, items_per_kept=share.items_per_kept * planned / len(chosen))
        return Selection(kept, elements, counts, kept_counts, share)

    def _trimmed_sum(self, group, selection: Selection) -> Tensor:
        """The weighted sum of the trimmed means (or sums) over the same items."""
        first, _ = group[0]
        if not selection.kept.numel():
            return self._zero_with_gradients(first)
        kept, elements = selection.kept, selection.elements
        if self._is_replay:  # this forward pass has the kept samples alone
            kept = elements = torch.arange(first.losses.numel(), device=kept.device)
        terms = []
        for (call, weight), counts, kept_counts in zip(group, selection.counts, selection.kept_counts, strict=True):
            if call.reduction == "mean":
                factor = weight
            elif self._has_loss_per_item(call):
                factor = weight * selection.share.items_per_kept * kept_counts
            else:
                factor = weight * counts
            terms.append((call, torch.where(kept_counts > 0, factor / kept_counts, 0)))
        return self._take(terms, kept, elements, self._items_are_samples(first))

    def _zero_with_gradients(self, call: LossCall) -> Tensor:
        """
        Zero, with a gradient of zero for each parameter. Engines such as DDP wait for the gradient of each parameter,
        so one item takes the ordinary way with the factor 0.
        """
        usable = (call.finite & (call.counts > 0)).nonzero().flatten()[:1]
        if self.dropped or not usable.numel():
            return self.zero()
        sample = usable // max(1, call.losses.numel() // self.batch_size)
        return self._take([(call, call.losses.new_zeros(()))], sample, usable, self._items_are_samples(call))

    def _scores(self, group, all_counts, samples: bool) -> tuple[Tensor, Tensor, Tensor]:
        """For each item: what it is ranked by, whether it has a label, and whether its losses are finite."""
        ranks: tuple[Any, Any, Any] = 0, False, True  # neutral in a sum, an or, an and of tensors
        scores, valid, finite = ranks
        for (call, weight), counts in zip(group, all_counts, strict=True):
            losses, labelled, is_finite = call.losses.detach(), call.counts > 0, call.finite | (call.counts == 0)
            if samples and losses.numel() != self.batch_size:
                losses, labelled, is_finite = (self._by_sample(x) for x in (losses, labelled, is_finite))
                self._check_samples(labelled.sum(1), call.ignore_index)
                sample_counts = call.counts.view(labelled.shape).sum(1)
                losses = losses.where(labelled, 0).sum(1) / sample_counts.where(sample_counts > 0, 1)
                labelled, is_finite = labelled.any(1), is_finite.all(1)
            if call.reduction == "sum":
                weight = weight * (counts if self.num_items is None else self.num_items)
            scores, valid, finite = scores + weight * losses, valid | labelled, finite & is_finite
        return scores, valid, self._finite(finite)

    def _by_sample(self, values: Tensor) -> Tensor:
        """`[B·T]` values → `[B, T]`."""
        if values.numel() % self.batch_size:
            raise self._unknown_samples(values.numel())
        return values.view(self.batch_size, -1)

    def _check_samples(self, num_losses: Tensor, ignore_index: int) -> None:
        """
        Check that each sample has as many losses `[B]` as labels. Some models leave out what has no label, so that
        losses are not in the places of their labels.
        """
        if self.labels is None:
            return
        labelled = self.labels.to(num_losses.device) != ignore_index
        if not any(torch.equal(num_losses, x.flatten(1).sum(1)) for x in (labelled, labelled[..., 1:])):
            raise self._unknown_samples(int(num_losses.sum()))

    def _unknown_samples(self, count: int) -> ValueError:
        return ValueError(
            f"The model has {count} losses for {self.batch_size} samples, and which belong to which is not known: use "
            "trim_unit='token' and trim_nonfinite='error'."
        )

    def _finite(self, finite: Tensor) -> Tensor:
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
        finite_samples = self._by_sample(finite).all(1)
        self.dropped += int((~finite_samples).sum())
        return finite_samples.repeat_interleave(finite.numel() // self.batch_size)

    def _take(self, terms, kept: Tensor, elements: Tensor, samples: bool) -> Tensor:
        """The weighted sum of the kept losses, with the backward pass that was asked for."""
        rows, dense_above = kept if samples else None, {}
        if self.dropped:
            # A dropped sample must not get a gradient of zero either, since 0 · NaN = NaN. So the backward pass is
            # row-sparse, however many samples are kept.
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

    def _note_for_logs(self, scores: Tensor, valid: Tensor, kept: Tensor) -> None:
        count = valid.sum()
        mean = scores.where(valid, 0).sum() / count
        if not kept.numel():
            return
        kept_count, threshold = scores.new_tensor(float(kept.numel())), scores[kept].min()
        if self.logged is None:
            self.logged = [kept_count, count.to(scores), threshold, mean]
        else:  # a model with several kinds of items: the losses add up, the threshold is that of the first kind
            previous = self.logged
            self.logged = [kept_count + previous[0], count.to(scores) + previous[1], previous[2], mean + previous[3]]
