"""
What the host need not wait for.

A GPU works through a queue that the host fills. To read a number from it, the host waits until the queue is empty, and
the GPU then waits for the host. For example, k = 3 kept items of 8: on the CPU k is read, and indices `[3]` are made.
On a GPU k stays there; where at most 4 can be kept, the indices are `[4]`, and the last one has a weight of 0.
"""

from typing import Any

import torch
from torch import Tensor

from hf_trim.backward._torch_internals import version_of


def reads_freely(device: torch.device) -> bool:
    """
    Whether the host may read numbers of a device at any time.

    Args:
        device (`torch.device`): The device.

    Returns:
        `bool`: On the CPU; and on Apple's GPUs, which have no float64 to count items in.
    """
    return device.type in ("cpu", "mps")


def number(value: Tensor) -> int | Tensor:
    """
    Args:
        value (`torch.Tensor`): A scalar of integers.

    Returns:
        `int` or `torch.Tensor`: The number, or the scalar itself where the host would wait for it.
    """
    return int(value) if reads_freely(value.device) else value


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """
    Copy values of the host to a device.

    Args:
        values (`torch.Tensor`): A tensor of the CPU.
        device (`torch.device`): The device.

    Returns:
        `torch.Tensor`: The same values there. A GPU copies them from memory that stays in place, so that the host goes
        on meanwhile.
    """
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def mark_range(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """
    Call `torch.arange`, and remember what it has returned if that is 0, 1, 2, ...: a lookup `x[arange(B), positions]`
    then shows in the backward pass that it takes one entry of each sample, without a look at the device.

    Args:
        args, kwargs: Its arguments.

    Returns:
        `torch.Tensor`: Its result.
    """
    numbers = torch.arange(*args, **kwargs)
    if len(args) == 1 and isinstance(args[0], int) and not {"end", "start", "step", "out"} & kwargs.keys():
        numbers.hf_trim_range = version_of(numbers)  # type: ignore[attr-defined]
    return numbers


def is_range(numbers: Tensor) -> bool:
    """
    Args:
        numbers (`torch.Tensor`): Numbers on any device.

    Returns:
        `bool`: Whether they are known to be 0, 1, 2, ...: [`mark_range`] has made them, and nothing was written to
        them.
    """
    return getattr(numbers, "hf_trim_range", None) == version_of(numbers)


def zeros(size: list[int], **options: Any) -> Tensor:
    """
    Args:
        size, options: As `torch.zeros` has them.

    Returns:
        `torch.Tensor`: Zeros for which [`are_zeros`] is true as long as nothing is written to them.
    """
    made = torch.zeros(size, **options)
    made.hf_trim_zeros = version_of(made)  # type: ignore[attr-defined]
    return made


def are_zeros(x: Tensor) -> bool:
    """
    Args:
        x (`torch.Tensor`): A tensor on any device.

    Returns:
        `bool`: Whether it is known to be zero: [`zeros`] has made it, and nothing was written to it.
    """
    return getattr(x, "hf_trim_zeros", None) == version_of(x)


class Later:
    """
    A number that the device is asked for early, and the host reads late. It then waits only for what was in the queue
    before the question; what came into it since then goes on.

    Args:
        value (`torch.Tensor`): The scalar on the device.
    """

    def __init__(self, value: Tensor):
        self._is_there: torch.cuda.Event | None = None
        device = value.device
        if device.type == "cuda":
            value = value.detach().to("cpu", non_blocking=True)
            self._is_there = torch.cuda.current_stream(device).record_event()
        self._value = value

    def read(self) -> float:
        """
        Returns:
            `float`: The number; an integer if the tensor has these.
        """
        if self._is_there is not None:
            self._is_there.synchronize()
        return self._value.item()
