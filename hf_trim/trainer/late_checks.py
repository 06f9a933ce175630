"""
Between the steps of: batch → per-item losses → keep decision → trimmed backward → logs.

What is wrong with a mini-batch shows in numbers of the device, for which the host of a GPU would have to wait. There
it looks when it waits anyway: before something is logged or saved. For example, a loss of step 7 is NaN, and each 10th
step is logged: in step 10 comes the error "In optimizer step 7: 1 of 32 losses ... are NaN". With a gradient scaler
(fp16) it is a warning, since the scaler skips the step.
"""

import logging

import torch
from torch import Tensor

from hf_trim.backward import waiting


logger = logging.getLogger(__name__)


class LateChecks:
    """Checks of mini-batches, which raise an error at once where that costs nothing, or else in [`read`]."""

    def __init__(self):
        self._found: dict[str, Tensor] = {}  # message → `[2]`: the step in which it was met first, and how often there
        self.step = 0
        self.is_first = True
        self.skips_nonfinite = False
        self._skipped: set[str] = set()  # messages of what a gradient scaler skips
        self._has_warned = False

    def begin_batch(self, step: int, is_first: bool, skips_nonfinite: bool) -> None:
        """
        Args:
            step (`int`): The number of the optimizer step.
            is_first (`bool`): Whether it is a training's first mini-batch: an error of the user's shows at once.
            skips_nonfinite (`bool`): Whether steps with losses that are not finite are skipped by a gradient scaler.
        """
        self.step, self.is_first, self.skips_nonfinite = step, is_first, skips_nonfinite

    def refuse(self, count: Tensor, message: str, is_nonfinite: bool = False) -> None:
        """
        Check a mini-batch.

        Args:
            count (`torch.Tensor`): What is wrong: a number, or whether there is something.
            message (`str`): What is said of it, with a place `{count}` for the number.
            is_nonfinite (`bool`, *optional*, defaults to `False`): Whether it is that losses are not finite.

        Raises:
            `ValueError`: If something is wrong, and the host may know it now.
        """
        if is_nonfinite and self.skips_nonfinite:
            self._skipped.add(message)
        if self.is_first or waiting.reads_freely(count.device):
            if number := int(count):
                self._tell(message, message.format(count=number))
            return
        now = torch.stack([torch.full_like(count, self.step, dtype=torch.long), count.long()])
        before = self._found.get(message)
        self._found[message] = now if before is None else torch.where(before[1] > 0, before, now)

    def read(self) -> None:
        """
        Wait for the checks since the last call.

        Raises:
            `ValueError`: For the first step in which something was wrong.
        """
        found, self._found = [(*numbers.tolist(), message) for message, numbers in self._found.items()], {}
        for step, count, message in sorted(found):
            if count:
                self._tell(message, f"In optimizer step {step}: {message.format(count=count)}")

    def _tell(self, message: str, text: str) -> None:
        if message not in self._skipped:
            raise ValueError(text)
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s In half precision the gradient scaler skips the step, as in plain Trainer. Later ones are skipped "
                "without a message.", text,
            )  # fmt: skip
