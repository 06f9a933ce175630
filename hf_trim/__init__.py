"""Mini-batch trimming for Hugging Face: swap `Trainer` for `TrimmingTrainer`."""

import importlib
from typing import TYPE_CHECKING, Any

from hf_trim.torchvision_cpu import repair_torchvision


if TYPE_CHECKING:
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

repair_torchvision()  # before transformers imports it: a CUDA build of torchvision fails beside a CPU build of torch

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


def __getattr__(name: str) -> Any:
    """Import what is asked for: torch and transformers take seconds, and `hf-trim --version` needs neither."""
    if name in __all__:
        room = importlib.import_module("hf_trim.backward" if name == "skip_zero_rows" else "hf_trim.trainer")
        value = globals()[name] = getattr(room, name)  # it is asked for here once only
        return value
    if name in ("backward", "trainer"):
        return importlib.import_module(f"hf_trim.{name}")
    raise AttributeError(f"module 'hf_trim' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
