"""
Step 5 (logs) of: batch → per-item losses → keep decision → trimmed backward → logs.

What was trimmed since the last log, averaged over mini-batches and processes.
"""

import torch
from accelerate import Accelerator

from hf_trim.trainer.batch import TrimmedBatch


LOGGED = ("keep_fraction", "kept_fraction", "trim_threshold", "full_loss")


class TrimmingLogs:
    """
    Averages of what is logged beside `loss`: `keep_fraction` (p, the fraction that was asked for), `kept_fraction`
    (the fraction that was really kept: k items of n, so that it differs from p by rounding), `trim_threshold` (the
    lowest loss that was kept) and `full_loss` (the mean loss of the whole mini-batch).
    """

    def __init__(self):
        self._sums = torch.zeros(len(LOGGED) + 1, dtype=torch.float64)  # the last one counts mini-batches

    def add(self, keep: float, batch: TrimmedBatch) -> None:
        """
        Add a mini-batch.

        Args:
            keep (`float`): Fraction p that was asked for.
            batch ([`~hf_trim.trainer.batch.TrimmedBatch`]): The mini-batch; without a valid item it does not count.
        """
        if batch.logged is None:
            return
        num_kept, num_valid, threshold, full_loss = torch.stack(batch.logged).tolist()
        values = [keep, num_kept / num_valid, threshold, full_loss, 1.0]
        self._sums += torch.tensor(values, dtype=torch.float64)

    def take(self, accelerator: Accelerator, device: torch.device) -> dict[str, float]:
        """
        Average what was added since the last call, and start again.

        Args:
            accelerator (`accelerate.Accelerator`): Adds the other processes.
            device (`torch.device`): The device of this process.

        Returns:
            `dict[str, float]`: Name → average; empty if there was no mini-batch.
        """
        *sums, count = accelerator.reduce(self._sums.float().to(device)).tolist()
        self._sums.zero_()
        return {name: value / count for name, value in zip(LOGGED, sums, strict=True)} if count > 0 else {}
