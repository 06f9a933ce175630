"""
Step 3 (keep decision) of: batch → per-item losses → keep decision → trimmed backward → logs.

With `trim_scope="global"` the hardest items are chosen among those of all processes. Each process gathers all scores
and makes the same choice. For example, with 2 processes that have 3 and 2 items, each with a score, a mass and a
count: `[3, 3]` and `[2, 3]` are padded to `[3, 3]`, gathered as `[2, 3, 3]`, and joined without the padding as
`[5, 3]`. The items of the second process begin at index 3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor


@cache
def _host_group(default_group: Any) -> Any:
    """The processes of a group, which talk through the memory of their hosts."""
    return dist.new_group(backend="gloo")


def host_numbers(number: int, accelerator: Accelerator) -> list[int]:
    """
    Collect a number of each process. The hosts wait for each other, but not for their devices.

    Args:
        number (`int`): That of this process.
        accelerator (`accelerate.Accelerator`): Knows the processes.

    Returns:
        `list[int]`: The numbers, process by process.
    """
    return _gather_on_hosts(torch.tensor([number]), accelerator).tolist()


def host_columns(own: Tensor, accelerator: Accelerator) -> Tensor:
    """
    Collect numbers of all processes, in the memory of their hosts.

    Args:
        own (`torch.Tensor`): `[r, n]` numbers of this process, on the CPU; n may differ between the processes.
        accelerator (`accelerate.Accelerator`): Knows the processes.

    Returns:
        `torch.Tensor`: `[r, n of all]`, process by process.
    """
    sizes = host_numbers(own.shape[1], accelerator)
    padded = torch.nn.functional.pad(own, (0, max(sizes) - own.shape[1]))
    gathered = _gather_on_hosts(padded[None].contiguous(), accelerator)
    return torch.cat([part[:, :size] for part, size in zip(gathered, sizes, strict=True)], 1)


def _gather_on_hosts(own: Tensor, accelerator: Accelerator) -> Tensor:
    """`[1, ...]` on the CPU of each process → `[processes, ...]`, without a wait for the devices where that can be."""
    if not (dist.is_available() and dist.is_initialized()):
        return accelerator.gather(own.to(accelerator.device)).cpu()
    group = None if dist.get_backend() == "gloo" else _host_group(dist.group.WORLD)
    gathered = torch.empty(dist.get_world_size(), *own.shape[1:], dtype=own.dtype)
    dist.all_gather_into_tensor(gathered, own, group=group)
    return gathered


@dataclass
class ProcessGroup:
    """
    The processes that choose the hardest items together (`trim_scope="global"`).

    Args:
        gather (`Callable`): Collective operation, `[m, c]` of each process → `[processes, m, c]` on all of them.
        gather_sizes (`Callable`): The same of a number of the host, see [`host_numbers`].
        rank (`int`): Index of this process.
        size (`int`): Number of processes.
        device (`torch.device`): Where the losses of this process are.
    """

    gather: Callable[[Tensor], Tensor]
    gather_sizes: Callable[[int], list[int]]
    rank: int
    size: int
    device: torch.device

    def union(self, values: Tensor) -> tuple[Tensor, int]:
        """
        Collect the items of all processes.

        Args:
            values (`torch.Tensor`): `[n, c]` numbers of each item of this process; n may differ between the processes.

        Returns:
            `tuple[torch.Tensor, int]`: All items, process by process, and the index at which those of this process
            begin.
        """
        sizes = self.gather_sizes(len(values))
        # A collective needs the same shape everywhere.
        padded = self.gather(torch.nn.functional.pad(values, (0, 0, 0, max(sizes) - len(values))))
        return torch.cat([x[:size] for x, size in zip(padded, sizes, strict=True)]), sum(sizes[: self.rank])
