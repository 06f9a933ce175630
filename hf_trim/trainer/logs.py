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
        # The numbers stay on the device until a log is due.
        self._trimmed: Tensor | float = 0.0  # `[6]`, sums over the mini-batches that were trimmed, and their number
        self._num_untrimmed = 0
        self._loss: Tensor | float = 0.0
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
            num_kept, num_valid = batch.logged[:2]
            kept = num_kept / num_valid
            keep = kept if batch.config.is_adaptive else torch.full_like(kept, batch.keep)
            values = torch.cat([torch.stack([keep, kept]), batch.logged[2:], torch.ones_like(batch.logged[:1])])
            self._trimmed = self._trimmed + values.where((num_valid > 0) & values.isfinite().all(), 0)

    def add_untrimmed(self) -> None:
        """Add a mini-batch of which everything is kept."""
        self._num_untrimmed += 1

    def add_loss(self, loss: Tensor, step: int) -> None:
        """
        Add what plain `Trainer` would add to its loss.

        Args:
            loss (`torch.Tensor`): The scalar loss of a training step, before it is trimmed.
            step (`int`): Number of optimizer steps so far.
        """
        self._first_step = step if self._first_step is None else self._first_step
        # As there, an average in the place of one that is not finite.
        average = self._loss / (1 + step - self._first_step)
        self._loss = self._loss + loss.detach().where(loss.detach().isfinite(), average)

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
        parts = [torch.as_tensor(x, dtype=torch.float32, device=device) for x in (self._trimmed, self._loss)]
        untrimmed = torch.full((1,), float(self._num_untrimmed), device=device)
        totals = accelerator.reduce(torch.cat([parts[0].expand(6), parts[1].reshape(1), untrimmed])).tolist()
        keep, kept, threshold, kept_mass, mass, num_trimmed, loss, num_untrimmed = totals
        averages: dict[str, float] = {}
        if number := num_trimmed + num_untrimmed:
            averages["keep_fraction"] = (keep + num_untrimmed) / number
            averages["kept_fraction"] = (kept + num_untrimmed) / number
        if num_trimmed:
            averages["trim_threshold"] = threshold / num_trimmed
            averages["kept_mass"] = kept_mass / mass if mass > 0 else 1.0
        # `Trainer` divides its loss by the number of optimizer steps, not of mini-batches.
        num_steps = (step - (self._first_step or 0)) * accelerator.num_processes
        if self._first_step is not None and num_steps > 0:
            averages["full_loss"] = loss / num_steps
        self.__init__()  # type: ignore[misc]
        return averages
