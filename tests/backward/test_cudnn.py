"""Ops of cuDNN that write down what cannot be sliced: they run on the whole batch, and the kept rows are taken."""

import pytest
import torch

from hf_trim.backward.eager.rows import Rows
from hf_trim.backward.eager.tensor import RowSparseTensor
from hf_trim.backward.settings import strict
from tests.support.rule_cases import close


BATCH, TIME, FEATURES = 6, 4, 3


def rnn_backward(x, weights, stride, buffer, hx, cx, out, grad_out, grad_hy, grad_cy, *options):
    """A stand-in on the CPU: what it does with a sample is known by the sample's place alone."""
    batch_first, reserve = options[4], options[10]
    of_samples = reserve[:, None, None] if batch_first else reserve[:, None]
    dx, dhx = grad_out * of_samples, grad_hy * reserve[:, None]
    return dx, dhx, torch.zeros_like(hx) if grad_cy is None else grad_cy * reserve[:, None], [dx.sum((0, 1))]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("has_cells", [False, True])
def test_rnn(batch_first, has_cells):
    rows, dim = Rows(torch.tensor([4, 1]), BATCH), 0 if batch_first else 1
    x = torch.randn(BATCH, TIME, FEATURES) if batch_first else torch.randn(TIME, BATCH, FEATURES)
    states, reserve = torch.randn(1, BATCH, FEATURES), torch.rand(BATCH)
    grads = [RowSparseTensor(rows.take(x, dim), rows, dim), RowSparseTensor(rows.take(states, 1), rows, 1), None]
    if has_cells:
        grads[2] = RowSparseTensor(rows.take(states.sin(), 1), rows, 1)

    def run(grads):
        options = 2, FEATURES, 0, 1, batch_first, 0.0, True, False, [], None, reserve, [True] * 4
        return torch.ops.aten._cudnn_rnn_backward(x, [x[0, :1]], 1, x, states, states, x, *grads, *options)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_cudnn_rnn_backward", rnn_backward, "CPU")
        expected = run([grad if grad is None else grad.densify() for grad in grads])
        with strict():
            result = run(grads)
    for a, b in zip((*result[:3], *result[3]), (*expected[:3], *expected[3]), strict=True):
        close(a, b)
    assert all(isinstance(grad, RowSparseTensor) for grad in result[: 2 + has_cells])
