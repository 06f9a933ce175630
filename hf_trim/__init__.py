"""Mini-batch trimming for Hugging Face: swap `Trainer` for `TrimmingTrainer`."""

from hf_trim.torchvision_cpu import import_torchvision


import_torchvision()  # before transformers imports it: a CUDA build of torchvision fails beside a CPU build of torch

from hf_trim.backward import skip_zero_rows
from hf_trim.trainer import (
    TrimmingArguments,
    TrimmingConfig,
    TrimmingMixin,
    TrimmingTrainer,
    linear_fraction,
    mark_losses,
    select_items,
    trimmed_linear_cross_entropy,
    trimmed_mean,
)


__version__ = "0.1.0"
__all__ = [
    "TrimmingArguments",
    "TrimmingConfig",
    "TrimmingMixin",
    "TrimmingTrainer",
    "linear_fraction",
    "mark_losses",
    "select_items",
    "skip_zero_rows",
    "trimmed_linear_cross_entropy",
    "trimmed_mean",
]
