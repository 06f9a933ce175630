"""
Step 3 (keep decision) of: batch → per-item losses → keep decision → trimmed backward → logs.

What an item's gradient mass has been on average in the training so far. Adaptive trimming leaves out a share of the
mass of such an average mini-batch: near convergence, where all losses are small, these are most of the items. For
example, a mean of 0.3 over the steps so far: a mini-batch of 64 items may leave out 5 % of 64 · 0.3, which is 0.96,
even if its own mass is 2.

The numbers are part of `TrainerState`, so that they are in each checkpoint, and are the same in all processes.
"""

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerState

from hf_trim.trainer.batch import TrimmedBatch
from hf_trim.trainer.kept_state import MASS, kept_state


class MassHistory:
    """The gradient mass of the items so far, for each group of items that are ranked together."""

    def __init__(self):
        self._step: list[Tensor] = []  # of each group in this step: `[2]`, the mass of all items and their number

    @staticmethod
    def _saved(state: TrainerState) -> list[list[float]]:
        """For each group, the sum of the means of the steps so far, and the number of these."""
        return kept_state(state, MASS).get("groups", [])

    def means(self, state: TrainerState) -> list[float]:
        """
        Args:
            state ([`~transformers.TrainerState`]): The trainer's state.

        Returns:
            `list[float]`: For each group of items, the mean of the steps so far; the mean of a step is over its items.
        """
        return [total / max(steps, 1) for total, steps in self._saved(state)]

    def add(self, batch: TrimmedBatch) -> None:
        """
        Add a mini-batch of this step.

        Args:
            batch ([`~hf_trim.trainer.batch.TrimmedBatch`]): The mini-batch.
        """
        for number, sums in enumerate(batch.masses):
            if number < len(self._step):
                self._step[number] = self._step[number] + sums
            else:
                self._step.append(sums)

    def end_step(self, state: TrainerState, accelerator: Accelerator) -> None:
        """
        Put the step into the trainer's state. All processes call this at the same time.

        Args:
            state ([`~transformers.TrainerState`]): The trainer's state.
            accelerator (`accelerate.Accelerator`): Adds the other processes.
        """
        own, self._step = self._step, []
        sums = torch.stack(own).float() if own else torch.zeros(0, 2, device=accelerator.device)
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(accelerator.pad_across_processes(sums), reduction="sum")
        groups = [list(group) for group in self._saved(state)]
        for number, (mass, count) in enumerate(sums.tolist()):
            if number == len(groups):
                groups.append([0.0, 0])
            if count:
                groups[number] = [groups[number][0] + mass / count, groups[number][1] + 1]
        kept_state(state, MASS)["groups"] = groups
