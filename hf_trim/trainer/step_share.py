"""
Step 3 (keep decision) of: batch → per-item losses → keep decision → trimmed backward → logs.

An optimizer step may have several mini-batches, on one or more devices. Its loss is the mean over all items that they
keep together, so each mini-batch needs its share in that mean. The labels give it before any mini-batch is run.

For example, p = 0.5 and two mini-batches with 8 and 4 labelled samples: they keep 4 and 2, so the first has the share
4 / 6 of the kept and 8 / 12 of all samples, and there are 12 / 6 samples for each kept one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainingArguments

from hf_trim._compat import find_batch_size
from hf_trim.trainer.losses import LossCall, valid_items
from hf_trim.trainer.selection import num_kept


@dataclass
class StepShare:
    """
    What a mini-batch counts for among all mini-batches of its optimizer step, on all devices.

    Args:
        kept (`float`): Its share of the items that the step keeps.
        valid (`float`): Its share of all items of the step.
        items_per_kept (`float`): Items of the step divided by the items that it keeps: 1/p, apart from rounding.
    """

    kept: float = 1.0
    valid: float = 1.0
    items_per_kept: float = 1.0


def step_share(keep: float, num_items: int, step_kept: int, step_items: int) -> StepShare:
    """
    The share of a mini-batch in its optimizer step.

    Args:
        keep (`float`): Fraction p to keep.
        num_items (`int`): Items of this mini-batch.
        step_kept (`int`): Items that the optimizer step keeps.
        step_items (`int`): Items of the optimizer step.

    Returns:
        [`StepShare`]: What this mini-batch counts for.
    """
    if not step_kept:
        return StepShare()
    return StepShare(num_kept(keep, num_items) / step_kept, num_items / step_items, step_items / step_kept)


class BatchLabels(NamedTuple):
    """
    The labels of a mini-batch, from which its items are counted.

    Args:
        size (`int`): Number B of samples.
        tensors (`dict[str, torch.Tensor]`): `labels` and `shift_labels`, as far as the batch has them.
    """

    size: int
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, batch: Mapping) -> "BatchLabels":
        """The labels of a mini-batch as the data collator made it."""
        names = ("labels", "shift_labels")
        return cls(find_batch_size(batch), {n: batch[n] for n in names if isinstance(batch.get(n), Tensor)})

    def num_tokens(self, ignore_index: int, shifted: bool) -> int:
        """
        Number of tokens with a label.

        Args:
            ignore_index (`int`): The label that means "no label".
            shifted (`bool`): Whether position t predicts label t + 1, so that the first label of a text is not used.
        """
        if "shift_labels" in self.tensors:
            return int((self.tensors["shift_labels"] != ignore_index).sum())
        labels = self.tensors["labels"][..., 1:] if shifted else self.tensors["labels"]
        return int((labels != ignore_index).sum())

    def num_samples(self) -> int:
        """Number of samples with a label."""
        labels = self.tensors.get("labels")
        if labels is None or len(labels) != self.size:
            return self.size
        return int(valid_items(labels, torch.Size([self.size])).sum())


class OptimizerStep:
    """The mini-batches of the optimizer step under way: their labels, and which of them is next."""

    def __init__(self):
        self.missing_batches = 0  # mini-batches of this step that other processes have more than this one
        self.begin([])

    def begin(self, batches: list[Mapping]) -> None:
        """
        Start an optimizer step.

        Args:
            batches (`list[Mapping]`): Its mini-batches on this device.
        """
        self.position = 0
        self._batches = [BatchLabels.of(batch) for batch in batches]
        self._counts: dict[tuple[bool, float], tuple[list[int], list[int]]] = {}

    def advance(self) -> None:
        """Go on to the next mini-batch."""
        self.position += 1

    @property
    def remaining(self) -> int:
        """Number of mini-batches that are not done yet."""
        return len(self._batches) - self.position

    def share(
        self,
        keep: float,
        call: LossCall,
        per_token: bool,
        batch: BatchLabels,
        is_global: bool,
        accelerator: Accelerator,
        args: TrainingArguments,
    ) -> StepShare:
        """
        The share of the next mini-batch. The first call of a step communicates with the other processes.

        Args:
            keep (`float`): Fraction p to keep.
            call ([`~hf_trim.trainer.losses.LossCall`]): A loss of this mini-batch. The number of its items tells
                whether the model shifts the labels.
            per_token (`bool`): Whether items are tokens; if not, they are samples.
            batch ([`BatchLabels`]): The labels of this mini-batch.
            is_global (`bool`): Whether all processes choose the hardest items together.
            accelerator (`accelerate.Accelerator`): Communicates with the other processes.
            args ([`~transformers.TrainingArguments`]): The training arguments.

        Returns:
            [`StepShare`]: What this mini-batch counts for.
        """
        if (per_token, keep) not in self._counts:
            # A `training_step` that is called outside of `train()` has one mini-batch.
            batches = self._batches or [batch]
            if per_token:
                num_items = int((call.counts > 0).sum())
                shifted = batch.num_tokens(call.ignore_index, shifted=False) != num_items
                counts = [x.num_tokens(call.ignore_index, shifted) for x in batches]
            else:
                counts = [x.num_samples() for x in batches]
            if is_global:
                counts = self._add_other_processes(counts, accelerator, args)
            totals = [sum(num_kept(keep, count) for count in counts), sum(counts)]
            if not is_global and args.average_tokens_across_devices and accelerator.num_processes > 1:
                totals = accelerator.reduce(torch.tensor(totals, device=args.device)).tolist()
            self._counts[per_token, keep] = (counts, totals)
        counts, totals = self._counts[per_token, keep]
        return step_share(keep, counts[min(self.position, len(counts) - 1)], *totals)

    def _add_other_processes(self, counts: list[int], accelerator: Accelerator, args: TrainingArguments) -> list[int]:
        """For each mini-batch of the step, the items of all processes, some of which may have fewer mini-batches."""
        length = max(args.gradient_accumulation_steps, len(counts))
        padded = torch.tensor([*counts, *[0] * (length - len(counts)), len(counts)], device=args.device)
        gathered = accelerator.gather(padded[None])
        self.missing_batches = int(gathered[:, -1].max()) - len(counts)
        return gathered[:, :-1].sum(0).tolist()
