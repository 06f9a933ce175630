"""
Starts the processes of a distributed training as forks of one process that has imported everything: the import takes
longer than most of the trainings.
"""

import gc
import os
import socket
from collections.abc import Callable

import torch
import torch._dynamo.backends.distributed  # noqa: F401
from accelerate.utils import is_deepspeed_available

from hf_trim.processes import leave_process_group


if is_deepspeed_available():  # accelerate would import it in each process
    import deepspeed  # noqa: F401


def run_forks(work: Callable[..., None], *args, processes: int) -> None:
    """
    Run a function in several processes with the environment that torchrun would give them, and wait for their end.

    Args:
        work (`Callable`): The function.
        args: Its arguments.
        processes (`int`): Number of processes.

    Raises:
        `torch.multiprocessing.ProcessRaisedException`: If it failed in one of them; the others are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    gc.freeze()  # as in conftest.py
    torch.multiprocessing.start_processes(_enter, (processes, port, work, args), processes, start_method="fork")


def _enter(rank: int, processes: int, port: int, work: Callable, args: tuple) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    work(*args)
    leave_process_group()
