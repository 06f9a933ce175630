"""The memory of a step is that of its tensors; waits of the host are those that torch tells of."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from hf_trim.bench.checks import SYNCHRONIZES, count_waits, measure_peak_memory
from hf_trim.bench.steps import UNTRIMMED, Steps
from tests.support.waits import counted_waits


def test_peak_memory():
    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1000))

        def forward(self, x):
            kept = x * self.weight  # 4 × 1000 floats, freed after exp, which saves its result
            return type("Output", (), {"logits": kept.exp()[:, :2]})

    batch = {"x": torch.ones(4, 1000), "labels": torch.zeros(4, dtype=torch.long)}
    peak = measure_peak_memory(Steps(Scale(), batch, "float32"), UNTRIMMED)
    # Live at once in the backward pass: exp's result, its gradient and that of the product.
    assert 3 * 16000 <= peak < 3 * 16000 + 8000


@pytest.fixture
def sync_debug_mode(monkeypatch):
    """What torch's mode is set to, where no GPU has one."""
    modes = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(
        torch.cuda, "set_sync_debug_mode", lambda mode: modes.append({"warn": 1, "default": 0}.get(mode, mode))
    )
    return modes


def test_waits_are_counted_as_torch_tells_them(sync_debug_mode):
    class Loss:
        def backward(self):
            for text in (SYNCHRONIZES, SYNCHRONIZES, "something else"):
                warnings.warn(f"{text} (Triggered internally at CUDAFunctions.cpp)", stacklevel=1)

    steps = SimpleNamespace(device="cuda", prepare=lambda seed: None, forward=lambda kind: Loss())
    with warnings.catch_warnings(record=True) as told:
        assert count_waits(steps, UNTRIMMED) == 2
        assert sync_debug_mode == [0, 1, 0] and not told
        with counted_waits("cuda") as waits:
            Loss().backward()
            waits.mini_batches += waits.is_on
            assert not waits
            waits.is_on = True
            Loss().backward()
            waits.mini_batches += waits.is_on
    assert waits.total() == 2 and waits.mini_batches == 1 and sync_debug_mode[-1] == 0
    assert {what for what, _ in waits} == {"synchronization"}
