"""The hardware and the versions with which a result was computed."""

import os
import platform

import torch
import transformers

from hf_trim import __version__


def hardware() -> str:
    """
    Name the hardware of this machine.

    Returns:
        `str`: The GPUs if there are any, else the CPU cores that this process may use, e.g. `"2 CPU cores"`.
    """
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} CPU cores"


def versions() -> dict[str, str]:
    """
    Collect the versions on which a result may depend.

    Returns:
        `dict[str, str]`: Versions by package.
    """
    return {
        "hf_trim": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
