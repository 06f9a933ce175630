"""No test touches the network: models are built from configs, data ships in packages or is written by the test."""

import gc
import os

import pytest


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
from torch._dynamo.utils import counters  # noqa: E402

import hf_trim  # noqa: E402, F401
from hf_trim.backward.compiled.graph import CompiledBackward  # noqa: E402
from hf_trim.backward.eager.checkpoint import _KeptRows  # noqa: E402
from hf_trim.backward.settings import reset_fallbacks  # noqa: E402


# The last module to end decides how long two workers take: those that start processes come first.
SLOW = (
    "engines",
    "run",
    "faults",
    "distributed",
    "bench",
    "compiled",
    "compiled_models",
    "compiled_trainer",
    "backward",
)


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": at for at, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.stem, len(SLOW)))


def pytest_collection_finish():
    # Each `Trainer` collects garbage when it ends, and would look at all that was imported: 0.3 s of 0.4.
    gc.freeze()


@pytest.fixture
def recomputed(monkeypatch):
    """How many checkpoints recomputed the kept rows, and how many everything after an attempt."""
    counts = {"kept": 0, "all": 0}

    def counted(name, method):
        def call(*args):
            counts[name] += 1
            return method(*args)

        return staticmethod(call)

    monkeypatch.setattr(_KeptRows, "_check", counted("kept", _KeptRows._check))
    monkeypatch.setattr(_KeptRows, "_forget", counted("all", _KeptRows._forget))
    return counts


@pytest.fixture
def fresh_compiler():
    """Nothing is compiled yet, and nothing counted."""
    torch._dynamo.reset()
    counters.clear()
    reset_fallbacks()
    yield
    torch._dynamo.reset()


@pytest.fixture
def runs(monkeypatch):
    """For each run of a compiled backward graph on the kept rows: their number, and that with the padded ones."""
    counts, run_on_rows = [], CompiledBackward._run_on_rows

    def spy(self, ctx, args, call, plan, values):
        grads = run_on_rows(self, ctx, args, call, plan, values)
        counts.append((call.rows.count, self.planner.sizes(plan, call.rows, values).row_count))
        return grads

    monkeypatch.setattr(CompiledBackward, "_run_on_rows", spy)
    return counts
