"""Processes that choose the hardest items together, here one after the other in one process."""

import torch

from hf_trim.trainer.process_group import ProcessGroup


CPU = torch.device("cpu")


def gather_from(*values):
    """What all processes give, in place of a collective that asks each of them."""
    return lambda own: torch.stack(values)


def test_sum():
    group = ProcessGroup(gather_from(torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])), 0, 2, CPU)
    assert [value.item() for value in group.sum([torch.tensor(1.0), torch.tensor(2.0)])] == [11.0, 22.0]


def test_union_of_scores_of_different_lengths():
    scores = {0: torch.tensor([3.0, 1.0, 2.0]), 1: torch.tensor([5.0, 4.0])}
    for rank, start in ((0, 0), (1, 3)):
        gathered = iter((torch.tensor([[3], [2]]), torch.tensor([[3.0, 1.0, 2.0], [5.0, 4.0, 0.0]])))
        asked = []
        group = ProcessGroup(
            lambda own, asked=asked, gathered=gathered: asked.append(own) or next(gathered), rank, 2, CPU
        )
        union, begin = group.union(scores[rank])
        assert union.tolist() == [3.0, 1.0, 2.0, 5.0, 4.0] and begin == start
        assert [len(own) for own in asked] == [1, 3]  # the same shapes in all processes
