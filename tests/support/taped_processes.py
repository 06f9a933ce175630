"""
Two processes under `DistributedDataParallel`, whose backward passes run from a tape: `python -m
tests.support.taped_processes` ends with an error where a gradient is not the mean of both processes' dense gradients.
"""

import socket

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_trim.backward import take_rows_sparse
from hf_trim.backward.eager.sparse import TAPES
from hf_trim.backward.settings import taped
from hf_trim.processes import leave_process_group


PROCESSES = 2


def losses_of(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    """`[6]` losses of a process's own batch."""
    torch.manual_seed(10 * step + rank)
    return model(torch.randn(6, 8)).pow(2).mean(1)


def train(rank: int, port: int) -> None:
    """Six steps: in three of them the tape runs alone, and no gradient is one process's own."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.Dropout(0.2))
    parallel = DistributedDataParallel(model, bucket_cap_mb=1e-4)  # a bucket for each layer
    for step in range(6):
        kept = torch.randperm(6, generator=torch.Generator().manual_seed(step))[:2]
        grads = []
        for other in range(PROCESSES):
            grads.append(torch.autograd.grad(losses_of(model, step, other)[kept].sum(), [*model.parameters()]))
        model.zero_grad()
        with taped():
            take_rows_sparse(losses_of(parallel, step, rank), kept).sum().backward()
        for p, *own in zip(model.parameters(), *grads, strict=True):
            torch.testing.assert_close(p.grad, sum(own) / PROCESSES)
    assert TAPES.counts["ran"] == 3, TAPES.counts
    torch.distributed.barrier()
    leave_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    torch.multiprocessing.start_processes(train, (number,), PROCESSES, start_method="fork")
