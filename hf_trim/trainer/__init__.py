"""The trainer: batch → per-item losses → keep decision → trimmed backward → logs."""

from hf_trim.trainer.arguments import TrimmingArguments, TrimmingConfig
from hf_trim.trainer.functional import trimmed_linear_cross_entropy, trimmed_mean
from hf_trim.trainer.schedule import linear_fraction
from hf_trim.trainer.selection import select_items
from hf_trim.trainer.trainer import TrimmingMixin, TrimmingTrainer


__all__ = [
    "TrimmingArguments",
    "TrimmingConfig",
    "TrimmingMixin",
    "TrimmingTrainer",
    "linear_fraction",
    "select_items",
    "trimmed_linear_cross_entropy",
    "trimmed_mean",
]
