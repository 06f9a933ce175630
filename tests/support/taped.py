"""
A small net, and a comparison of its gradients from tapes with the dense ones, step for step.

e.g. `run(lambda step: net(inputs(step)), net.parameters())`: six steps with other numbers and other kept rows in each.
A tape is recorded in step 2, compared in step 3, and used in steps 4 to 6.
"""

import torch
import torch.nn.functional as F
from torch import nn

from hf_trim.backward import take_rows_sparse, taped


B, T, C = 6, 5, 8
STEPS = 6


def kept_in(step, batch=B, k=2):
    return torch.randperm(batch, generator=torch.Generator().manual_seed(step))[:k]


def run(losses_of, parameters, steps=STEPS, backward=lambda loss: loss.backward(), tolerance=1e-6, ks=(2,), zero=True):
    """
    `losses_of(step)` → losses `[B]`: each step's gradients with a tape are those of `losses[kept]`. As many rows are
    kept as the numbers of `ks` say, in turn.
    """
    parameters = list(parameters)
    for step in range(steps):
        kept = kept_in(step, k=ks[step % len(ks)])
        grads = []
        for take in (torch.Tensor.__getitem__, take_rows_sparse):
            for p in parameters:
                p.grad = None
            for _ in range(1 if zero else 2):
                torch.manual_seed(step)
                with taped():
                    loss = take(losses_of(step), kept).sum()
                    backward(loss)
            grads.append([p.grad for p in parameters])
        for want, got in zip(*grads, strict=True):
            assert (want is None) == (got is None)
            if want is not None:
                assert type(got) is torch.Tensor
                torch.testing.assert_close(got, want, rtol=tolerance * 10, atol=tolerance)


class Net(nn.Module):
    """A bit of everything: dropout, a residual, normalization, a nonlinearity."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(C, C), nn.LayerNorm(C), nn.Linear(C, C)

    def hidden(self, x):
        return x + F.gelu(self.norm(F.dropout(self.first(x), 0.2)))

    def forward(self, x):
        return self.second(self.hidden(x)).pow(2).mean((1, 2))


def inputs(step, requires_grad=False):
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(step)).requires_grad_(requires_grad)
