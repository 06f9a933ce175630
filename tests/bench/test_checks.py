"""The memory of a step is that of its tensors."""

import torch

from hf_trim.bench.checks import measure_peak_memory
from hf_trim.bench.steps import UNTRIMMED, Steps


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
