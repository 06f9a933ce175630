"""Mini-batch trimming for Hugging Face: swap `Trainer` for `TrimmingTrainer`."""

from hf_trim.torchvision_cpu import import_torchvision


import_torchvision()  # transformers imports it, and must find it whole

from hf_trim.arguments import TrimmingArguments, TrimmingConfig
from hf_trim.functional import trimmed_linear_cross_entropy, trimmed_mean
from hf_trim.selection import select_items
from hf_trim.trainer import TrimmingMixin, TrimmingTrainer


__version__ = "0.1.0"
__all__ = [
    "TrimmingArguments",
    "TrimmingConfig",
    "TrimmingMixin",
    "TrimmingTrainer",
    "select_items",
    "trimmed_linear_cross_entropy",
    "trimmed_mean",
]
