"""The proof that a backward graph may run on the kept rows, on the graph of a linear layer."""

import pytest
import torch
from torch import nn

from hf_trim.backward._compile_internals import (
    aot_backward_graph,
    aot_function,
    aot_gradient_inputs,
    size_expression,
    traced_value,
)
from hf_trim.backward._torch_internals import is_composite
from hf_trim.backward.compiled.backend import keep_backward_graphs
from hf_trim.backward.compiled.proof import prove
from hf_trim.backward.compiled.values import Zeros
from hf_trim.backward.registry import PROOF
from tests.support.opinfo import DENSE, compare, compiled


@pytest.fixture(scope="module")
def graph():
    """The backward graph of a linear layer on `[B, T, 3]`, and its gradient `[B, T, 5]`."""
    torch._dynamo.reset()
    layer = torch.compile(nn.Linear(3, 5), backend="aot_eager", dynamic=True)
    with keep_backward_graphs():
        output = layer(torch.randn(4, 7, 3, requires_grad=True))
    graph = aot_backward_graph(aot_function(output.grad_fn))
    return graph, graph.find_nodes(op="placeholder")[aot_gradient_inputs(graph)[0]]


def test_rows_of_a_linear_layer(graph):
    graph, gradient = graph
    batch, length = (size_expression(size) for size in traced_value(gradient).shape[:2])
    proof = prove(graph, batch, {gradient: Zeros.OUTSIDE_KEPT})
    assert not proof.reason
    weight, bias, x = (next(v for v in proof.outputs if v and len(v.shape) == n) for n in (2, 1, 3))
    assert weight.row_dim is None and bias.row_dim is None  # sums over the rows
    assert (x.row_dim, x.outer, x.inner, x.zeros) == (0, 1, 1, Zeros.OUTSIDE_KEPT)
    saved = [value for value in proof.inputs if value and value.row_dim is not None and value.source is not gradient]
    assert saved and all(value.outer == 1 and value.inner in (1, length) for value in saved)


def test_a_dense_gradient_is_refused(graph):
    graph, gradient = graph
    batch = size_expression(traced_value(gradient).shape[0])
    assert "the terms may be nonzero outside of the kept rows" in prove(graph, batch, {gradient: Zeros.UNKNOWN}).reason


def test_no_gradient_is_zero_everywhere(graph):
    graph, gradient = graph
    batch = size_expression(traced_value(gradient).shape[0])
    proof = prove(graph, batch, {gradient: Zeros.EVERYWHERE})
    assert not proof.reason and all(value.zeros == Zeros.EVERYWHERE for value in proof.outputs if value)


def test_the_rows_may_be_those_of_another_dimension(graph):
    """With tokens as rows, `[B, T, 5]` has them in dimension 1, and merged, B is in front of them."""
    graph, gradient = graph
    batch, length = (size_expression(size) for size in traced_value(gradient).shape[:2])
    proof = prove(graph, length, {gradient: Zeros.OUTSIDE_KEPT})
    assert not proof.reason
    assert {(v.row_dim, v.outer, v.inner) for v in proof.outputs if v and len(v.shape) == 3} == {(1, 1, 1)}
    saved = [value for value in proof.inputs if value and value.row_dim is not None and value.source is not gradient]
    assert all(value.outer in (1, batch) and value.inner == 1 for value in saved)


def test_no_rule_is_of_a_composite_op():
    """AOTAutograd's graphs hold what a composite op is made of, so that a rule of it would never be called."""
    composite = []
    for name in PROOF.registered:
        packet = getattr(torch.ops.aten, name, None)
        ops = [getattr(packet, overload) for overload in packet.overloads()] if packet else []
        ops = [op for op in ops if torch._C._dispatch_has_kernel(op.name())]  # not those of TorchScript alone
        if ops and all(is_composite(op) for op in ops):
            composite.append(name)
    # Made of others on a CPU; a GPU has a kernel of its own for it.
    assert len(PROOF.registered) > 100 and composite == ["_fused_rms_norm"]


# ---- what looks like an op on rows, and is not -------------------------------------------------------------------


@torch.library.custom_op("hf_trim_tests::clone", mutates_args=())
def clone(x: torch.Tensor) -> torch.Tensor:
    """Mixes the rows, and is called as an op of ATen's that does not."""
    return x.flip(0)


clone.register_fake(torch.empty_like)
clone.register_autograd(lambda ctx, grad: clone(grad))


class _Scaled(torch.autograd.Function):
    """Its backward multiplies with a number that it computes from all rows."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (ctx.saved_tensors[0] > 0).sum().item()


class _Masked(torch.autograd.Function):
    """Its backward writes zeros to the rows that a saved mask says."""

    @staticmethod
    def forward(ctx, x, mask):
        ctx.save_for_backward(mask)
        return x * mask[:, None]

    @staticmethod
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        return grad.index_put((mask,), grad.new_zeros(())), None


def looked_up_row_numbers(x):
    return x * torch.arange(x.shape[0])[:, None].expand(x.shape)[:, torch.tensor([2, 0, 1])]


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda x: x.roll(x.shape[0], 1), "a value depends on the batch size"),
        (looked_up_row_numbers, "a value depends on the number of a row"),
        (clone, "hf_trim_tests.clone.default: it has no rule"),
        (_Scaled.apply, "the terms may be nonzero outside of the kept rows"),
        (lambda x: _Masked.apply(x, x[:, 0] > 0), "it may look up entries of other rows"),
    ],
    ids=["batch size", "row numbers", "namesake", "number", "mask"],
)
def test_refused(function, reason):
    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.double, requires_grad=True)
    out = compiled(function, (x, (), {}), decomposed=function is looked_up_row_numbers)
    outcome, why = compare(out, [x], torch.tensor([0, 1, 3]))
    assert outcome == DENSE and reason in why[0]
