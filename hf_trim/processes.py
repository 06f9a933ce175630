"""How a process of a distributed training ends."""

import sys
import time


def leave_process_group() -> None:
    """
    End this process's part in a distributed training. It first waits 0.2 s for the threads of gloo to release their
    tensors: a thread that does so while Python ends aborts the process
    (https://github.com/pytorch/pytorch/issues/190489), and one that does so while a `DistributedDataParallel` is freed
    after the group hangs it: each waits for the other. Does nothing without a process group.
    """
    if "torch" not in sys.modules:  # a command that only prints something does not import it
        return
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(0.2)
        torch.distributed.destroy_process_group()
