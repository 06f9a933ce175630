"""The end of a process that trained together with others."""

import time

import torch


def leave_process_group() -> None:
    """
    End this process's part in a distributed run. The threads of gloo get a moment for the tensors they still hold: one
    that lets a tensor go while Python ends aborts the process (https://github.com/pytorch/pytorch/issues/190489).
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(0.2)
        torch.distributed.destroy_process_group()
