"""
Between the steps of: batch → per-item losses → keep decision → trimmed backward → logs.

What is wrong with a mini-batch shows in numbers of the device, for which the host of a GPU would have to wait. There
it looks when it waits anyway: before something is logged or saved. For example, a loss of step 7 is NaN, and each 10th
step is logged: in step 10 comes the error "In optimizer step 7: 1 of 32 losses ... are NaN".
"""

import torch
from torch import Tensor

from hf_trim.backward import waiting


class LateChecks:
    """Checks of mini-batches, which raise an error at once where that costs nothing, or else in [`read`]."""

    def __init__(self):
        self._found: dict[str, Tensor] = {}  # message → `[2]`: the step in which it was met first, and how often there
        self.step = 0
        self.is_first = True

    def begin_batch(self, step: int, is_first: bool) -> None:
        """
        Args:
            step (`int`): The number of the optimizer step.
            is_first (`bool`): Whether it is a training's first mini-batch: an error of the user's shows at once.
        """
        self.step, self.is_first = step, is_first

    def refuse(self, count: Tensor, message: str) -> None:
        """
        Check a mini-batch.

        Args:
            count (`torch.Tensor`): What is wrong: a number, or whether there is something.
            message (`str`): What is said of it, with a place `{count}` for the number.

        Raises:
            `ValueError`: If something is wrong, and the host may know it now.
        """
        if self.is_first or waiting.reads_freely(count.device):
            if number := int(count):
                raise ValueError(message.format(count=number))
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
        wrong = [(step, message, count) for step, count, message in found if count]
        if wrong:
            step, message, count = min(wrong)
            raise ValueError(f"In optimizer step {step}: {message.format(count=count)}")
