"""
Step 3 (keep decision) of: batch → per-item losses → keep decision → trimmed backward → logs.

What an item's gradient mass has been on average in the training so far. Adaptive trimming leaves out a share of the
mass of such an average mini-batch: near convergence, where all losses are small, these are most of the items. For
example, a mean of 0.3 over the steps so far: a mini-batch of 64 items may leave out 5 % of 64 · 0.3, which is 0.96,
even if its own mass is 2.

The numbers are part of `TrainerState`, so that they are in each checkpoint, and are the same in all processes.
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerState

from hf_trim.backward import waiting
from hf_trim.trainer.batch import TrimmedBatch
from hf_trim.trainer.kept_state import MASS, kept_state
from hf_trim.trainer.process_group import host_numbers


class MassHistory:
    """The gradient mass of the items so far, for each group of items that are ranked together."""

    def __init__(self):
        self._step: list[Tensor] = []  # of each group in this step: `[2]`, the mass of all items and their number
        self._groups: Tensor | None = None  # what is saved, while it is on the device
        self._state: TrainerState | None = None  # whose it is

    @staticmethod
    def _saved(state: TrainerState) -> list[list[float]]:
        """For each group, the sum of the means of the steps so far, and the number of these."""
        return kept_state(state, MASS).get("groups", [])

    def means(self, state: TrainerState) -> Sequence[float | Tensor]:
        """
        Args:
            state ([`~transformers.TrainerState`]): The trainer's state.

        Returns:
            `Sequence[float | torch.Tensor]`: For each group of items, the mean of the steps so far; the mean of a step
                is over its items.
        """
        groups = self._groups if self._state is state else None
        if groups is not None and not waiting.reads_freely(groups.device):
            total, steps = groups.unbind(1)
            return (total / steps.clamp(min=1)).unbind()
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
        Add the step to the history. All processes call this at the same time.

        Args:
            state ([`~transformers.TrainerState`]): The trainer's state.
            accelerator (`accelerate.Accelerator`): Adds the other processes.
        """
        own, self._step = self._step, []
        device = accelerator.device
        sums = torch.stack(own).float() if own else torch.zeros(0, 2, device=device)
        if accelerator.num_processes > 1:
            most = max(host_numbers(len(own), accelerator))
            sums = accelerator.reduce(torch.nn.functional.pad(sums, (0, 0, 0, most - len(own))), reduction="sum")
        before = self._groups if self._state is state else None
        if before is None:
            before = torch.tensor(self._saved(state), dtype=torch.float64).reshape(-1, 2).to(sums.device)
        size = max(len(before), len(sums))
        before, sums = (torch.nn.functional.pad(x, (0, 0, 0, size - len(x))) for x in (before, sums.double()))
        mass, count = sums.unbind(1)
        is_met = count > 0
        step = torch.stack([torch.where(is_met, mass / count, 0), is_met.double()], 1)
        self._groups, self._state = before + step, state
        if waiting.reads_freely(sums.device):
            self.save(state)

    def save(self, state: TrainerState) -> None:
        """
        Put the history into the trainer's state.

        Args:
            state ([`~transformers.TrainerState`]): The trainer's state.
        """
        if self._groups is not None and self._state is state:
            groups = [[total, round(steps)] for total, steps in self._groups.tolist()]
            kept_state(state, MASS)["groups"] = groups
