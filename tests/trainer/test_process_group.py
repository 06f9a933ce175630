"""Processes that choose the hardest items together, here one after the other in one process."""

import torch

from hf_trim.trainer.process_group import ProcessGroup


CPU = torch.device("cpu")


def test_union_of_items_of_different_numbers():
    items = {0: torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 0.0]]), 1: torch.tensor([[5.0, 1.0], [4.0, 0.0]])}
    padded = torch.nn.functional.pad(items[1], (0, 0, 0, 1))
    for rank, start in ((0, 0), (1, 3)):
        asked = []

        def gather(own, asked=asked):
            asked.append(own.tolist())
            return torch.stack([items[0], padded])

        group = ProcessGroup(gather, lambda size: [3, 2], rank, 2, CPU)
        union, begin = group.union(items[rank])
        assert union.tolist() == [*items[0].tolist(), *items[1].tolist()] and begin == start
        assert asked == [(items[0], padded)[rank].tolist()]  # one collective, with the same shape in all processes
