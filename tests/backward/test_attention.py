"""Attention in the kernels of CUDA: dropout inside, biases that are learned, and masks that are padded in memory."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_trim.backward.compiled import graph
from hf_trim.backward.compiled.whole_batch import OnWholeBatch
from hf_trim.backward.eager.rows import Rows
from hf_trim.backward.eager.sparse import take_rows_sparse
from hf_trim.backward.settings import checked, refused_graphs, strict
from tests.support.attention_kernels import KERNELS, attend, register
from tests.support.compiled import Net, dense_take, step
from tests.support.helpers import relative_difference
from tests.support.rule_cases import Net as Weights
from tests.support.rule_cases import close, gradients


@pytest.fixture(scope="module", autouse=True)
def kernels_on_the_cpu():
    with torch.library._scoped_library("aten", "IMPL") as library:
        register(library)
        yield


def attention(kernel, dropout_p, bias):
    def case(net, x):
        def run(x):
            net.count = 0
            q, k, v = ((x @ net.w(x.shape[2], 6)).unflatten(2, (2, 3)).transpose(1, 2) for _ in range(3))
            shape = len(x), 2, x.shape[1], x.shape[1]
            return attend(kernel, q, k, v, bias and bias(net, shape).expand(shape), dropout_p).transpose(1, 2)

        return run(x)

    return case


BIASES = {
    "none": None,
    "learned": lambda net, shape: net.w(1, *shape[1:]),
    "of samples": lambda net, shape: torch.linspace(-1, 1, shape[0])[:, None, None, None] * net.w(1, *shape[1:]),
}


@pytest.mark.parametrize("kept", [[4], [4, 1], [0, 2, 3]])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize(
    "kernel, bias", [*((kernel, "none") for kernel in KERNELS), ("efficient", "learned"), ("efficient", "of samples")]
)
def test_exact(kernel, bias, dropout_p, checkpointed, kept, recomputed):
    function, net, x, kept = (
        attention(kernel, dropout_p, BIASES[bias]),
        Weights(),
        torch.randn(6, 4, 5),
        torch.tensor(kept),
    )

    def case(net, x):
        return checkpoint(function, net, x, use_reentrant=False) if checkpointed else function(net, x)

    dense = gradients(case, x, lambda losses: losses[kept], net)
    with strict():
        sparse = gradients(case, x, lambda losses: take_rows_sparse(losses, kept), net)
    for a, b in zip(dense, sparse, strict=True):
        close(a, b)
    assert recomputed == {"kept": int(checkpointed), "all": 0}


class Attention(nn.Module):
    """`[B, 8]` as 4 tokens of 2 heads; sequences may be several for a sample."""

    def __init__(self, kernel, bias, sequences):
        super().__init__()
        self.kernel, self.sequences, self.project = kernel, sequences, nn.Linear(4, 12)
        self.bias = nn.Parameter(torch.randn(1, 2, 4, 4)) if bias else None

    def forward(self, x):
        q, k, v = self.project(x.repeat(1, 2 * self.sequences).view(-1, 4, 4)).view(-1, 4, 3, 2, 2).unbind(2)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        bias = None if self.bias is None else self.bias.expand(len(q), -1, -1, -1)
        return x + attend(self.kernel, q, k, v, bias, dropout_p=0.5).transpose(1, 2).reshape(len(x), -1)[:, -8:]


WITH_BIAS = [*((kernel, False) for kernel in KERNELS), ("efficient", True)]


def compiled(*case, backend="aot_eager"):
    """A function that takes a step: `step(keep)` on the kept rows, `step(keep, dense_take)` dense."""
    net = Net(Attention(*case))
    call = torch.compile(net, backend=backend, dynamic=True)
    return partial(step, call, net, torch.randn(6, 3, 2, 2), torch.tensor([0, 1, 2] * 2))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kernel, bias", WITH_BIAS)
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("hf_trim", marks=pytest.mark.extended)])
def test_compiled(backend, sequences, kernel, bias, runs):
    take = compiled(kernel, bias, sequences, backend=backend)
    for keep in (0.5, 0.1, 0.3):  # one row runs as two
        expected = take(keep, dense_take)
        with strict(), checked(backend == "hf_trim"):
            assert relative_difference(take(keep), expected) <= 1e-5
    assert runs == [(3, 3), (1, 2), (2, 2)]


@pytest.mark.usefixtures("fresh_compiler")
def test_a_graph_that_is_compiled_in_its_first_backward_pass(runs, monkeypatch):
    """The compiler does not meet the ops that run on the whole batch: that pass is dense."""
    take = compiled("flash", False, 1)
    monkeypatch.setattr(graph, "aot_backward_is_compiled", lambda function: False)
    expected = take(0.5)
    monkeypatch.undo()
    with strict():
        assert relative_difference(take(0.5), expected) <= 1e-5
    assert not refused_graphs()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("checks", [True, False])
def test_an_op_that_is_not_met_where_it_is_called(checks, monkeypatch):
    """As where compiled code calls a kernel in another way than through the dispatcher."""
    monkeypatch.setattr(OnWholeBatch, "__torch_dispatch__", lambda _, op, types, args, kwargs: op(*args, **kwargs))
    take = compiled("flash", False, 1)
    expected = take(0.5, dense_take)
    for _ in range(2):
        with checked(checks):
            assert relative_difference(take(0.5), expected) <= 1e-5
    assert list(refused_graphs().values()) == [2] and "is not met" in next(iter(refused_graphs()))


def test_masks_keep_the_strides_that_kernels_check():
    mask = F.pad(torch.randn(6, 1, 13, 13), (0, 3))[..., :13].expand(-1, 4, -1, -1)
    for kept in ([1, 4], [0, 1]):
        part = Rows(torch.tensor(kept), 6).take(mask)
        assert part.stride() == (208, 0, 16, 1)
        close(part, mask[kept])
    end = torch.randn(6 * 208 - 3).as_strided((6, 13, 13), (208, 16, 1))  # the last padding is not in memory
    close(Rows(torch.tensor([1, 5]), 6).take(end), end[[1, 5]])
