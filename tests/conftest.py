"""No test touches the network: models are built from configs, data ships in packages or is written by the test."""

import gc
import importlib.metadata
import os
from functools import cache


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Models are so small here that threads would mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# After the variables, and before any test imports transformers: it repairs torchvision where torch has no CUDA.
import torch  # noqa: E402

import hf_trim  # noqa: E402, F401
from tests.support.quick import build_when_asked_to, use_no_clock  # noqa: E402


# Two things that take a fifth of the time of a tiny training: accelerate reads the metadata of packages again and
# again, and torch keeps each seed, with a stack trace, for the day when a GPU is used.
importlib.metadata.metadata = cache(importlib.metadata.metadata)
for backend in (torch.cuda, torch.xpu):
    if not backend.is_available():
        backend.manual_seed_all = lambda seed: None

use_no_clock()
build_when_asked_to()

# The last module to end decides how long two workers take: those that start processes or compile come first.
SLOW = ("compare", "engines", "faults", "distributed", "bench", "compiled", "compiled_models", "compiled_trainer",
        "compiled_heads", "backward")  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.stem, len(SLOW)))


def pytest_collection_finish():
    # Each `Trainer` collects garbage when it ends, and would look at all that was imported: 0.3 s of 0.4.
    gc.freeze()
