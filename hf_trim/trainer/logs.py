"""
Step 5 (logs) of: batch → per-item losses → keep decision → trimmed backward → logs.

What was trimmed since the last log, averaged over mini-batches and processes.
"""

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_trim.trainer.batch import TrimmedBatch


class TrimmingLogs:
    """
    Averages of what is logged beside `loss`: `keep_fraction` (p, the fraction that was asked for), `kept_fraction`
    (the fraction that was really kept: k items of n, so that it differs from p by rounding), `kept_mass` (the share of
    the gradient mass that was kept), `trim_threshold` (the lowest loss that was kept) and `full_loss` (the loss of the
    whole mini-batches, as plain `Trainer` would log it).
    """

    def __init__(self):
        names = ("keep_fraction", "kept_fraction", "trim_threshold", "kept_mass", "mass", "full_loss")
        self._sums = dict.fromkeys(names, 0.0)
        self._counts = dict.fromkeys(self._sums, 0)
        self._first_step: int | None = None  # the optimizer step in which the sums begin

    def add(self, batch: TrimmedBatch) -> None:
        """
        Add a mini-batch.

        Args:
            batch ([`~hf_trim.trainer.batch.TrimmedBatch`]): The mini-batch; without a valid item it does not count.
        """
        if batch.keeps_all:
            self.add_untrimmed()
        elif batch.logged is not None:
            num_kept, num_valid, threshold, kept_mass, mass = batch.logged
            kept = num_kept / num_valid
            keep = kept if batch.config.is_adaptive else batch.keep
            self._add(keep_fraction=keep, kept_fraction=kept, trim_threshold=threshold)
            self._add(kept_mass=kept_mass, mass=mass)

    def add_untrimmed(self) -> None:
        """Add a mini-batch of which everything is kept."""
        self._add(keep_fraction=1.0, kept_fraction=1.0)

    def add_loss(self, loss: Tensor, step: int) -> None:
        """
        Add what plain `Trainer` would add to its loss.

        Args:
            loss (`torch.Tensor`): The scalar loss of a training step, before it is trimmed.
            step (`int`): Number of optimizer steps so far.
        """
        self._add(full_loss=loss.detach())
        self._first_step = step if self._first_step is None else self._first_step

    def _add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value
            self._counts[name] += 1

    def take(self, accelerator: Accelerator, device: torch.device, step: int) -> dict[str, float]:
        """
        Average what was added since the last call, and start again.

        Args:
            accelerator (`accelerate.Accelerator`): Adds the other processes.
            device (`torch.device`): The device of this process.
            step (`int`): Number of optimizer steps so far.

        Returns:
            `dict[str, float]`: Name → average; without what was not met.
        """
        numbers = [*self._sums.values(), *self._counts.values()]
        totals = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=device) for x in numbers])
        sums, counts = accelerator.reduce(totals).chunk(2)
        # `Trainer` divides its loss by the number of optimizer steps, not of mini-batches.
        num_steps = (step - (self._first_step or 0)) * accelerator.num_processes
        averages = {
            name: value / (num_steps if name == "full_loss" else count)
            for name, value, count in zip(self._sums, sums.tolist(), counts.tolist(), strict=True)
            if count and (name != "full_loss" or num_steps > 0)
        }
        if (mass := averages.pop("mass", None)) is not None:
            averages["kept_mass"] = averages["kept_mass"] / mass if mass > 0 else 1.0
        self.__init__()  # type: ignore[misc]
        return averages
