"""
Step 3 (keep decision) of: batch → per-item losses → keep decision → trimmed backward → logs.

With `trim_scope="global"` the hardest items are chosen among those of all processes. Each process gathers all scores
and makes the same choice. For example, with 2 processes that have 3 and 2 items: scores `[3]` and `[2]` are padded to
`[3]`, gathered as `[2, 3]`, and joined without the padding as `[5]`. The items of the second process begin at index 3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ProcessGroup:
    """
    The processes that choose the hardest items together (`trim_scope="global"`).

    Args:
        gather (`Callable`): Collective operation, `[m]` of each process → `[processes, m]` on all of them.
        rank (`int`): Index of this process.
        size (`int`): Number of processes.
        device (`torch.device`): Where the losses of this process are.
    """

    gather: Callable[[Tensor], Tensor]
    rank: int
    size: int
    device: torch.device

    def sum(self, values: list[Tensor]) -> list[Tensor]:
        """
        Sum scalars over the processes.

        Args:
            values (`list[torch.Tensor]`): Scalars of this process.

        Returns:
            `list[torch.Tensor]`: The sum of each over the processes.
        """
        return list(self.gather(torch.stack(values)).sum(0))

    def union(self, scores: Tensor) -> tuple[Tensor, int]:
        """
        Collect the scores of all processes.

        Args:
            scores (`torch.Tensor`): `[n]` scores of this process; n may differ between the processes.

        Returns:
            `tuple[torch.Tensor, int]`: All scores, process by process, and the index at which those of this process
            begin.
        """
        sizes = self.gather(torch.tensor([len(scores)], device=scores.device)).flatten().tolist()
        # A collective needs the same shape everywhere.
        padded = self.gather(torch.nn.functional.pad(scores, (0, max(sizes) - len(scores))))
        return torch.cat([x[:size] for x, size in zip(padded, sizes, strict=True)]), sum(sizes[: self.rank])

    def join_without_items(self, num_calls: int, num_unions: int) -> None:
        """
        Take part in a choice without any item, because other processes have one mini-batch more. Without this the
        collectives of those processes would wait for ever. The calls are those of `TrimmedBatch`, in the same order.

        Args:
            num_calls (`int`): Number of calls of loss functions.
            num_unions (`int`): Number of unions: of the scores alone, or of mass and scores.
        """
        for _ in range(num_unions):
            self.union(torch.zeros(0, device=self.device))
        self.sum([torch.zeros((), device=self.device)] * (2 * num_calls))
