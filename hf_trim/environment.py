"""What a result may depend on beside its settings: hardware and versions."""

import os
import platform

import torch
import transformers


def hardware() -> str:
    """
    Returns:
        `str`: What the run ran on, e.g. `"2 CPU cores"` or a GPU's name.
    """
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} CPU cores"


def versions() -> dict[str, str]:
    """
    Returns:
        `dict[str, str]`: Versions that a result may depend on.
    """
    from hf_trim import __version__

    return {
        "hf_trim": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
