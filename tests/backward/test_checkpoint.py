"""Gradient checkpointing recomputes the kept rows only, and all rows where one needs the others."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_trim.backward.eager.activation import ActivationRows
from hf_trim.backward.eager.rules.pointwise import dense_rule
from hf_trim.backward.eager.sparse import take_rows_sparse
from hf_trim.backward.registry import GRADIENTS
from hf_trim.backward.settings import fallback_report
from tests.support.rule_cases import CASES, KEPT, close, compare, slice_small_tensors  # noqa: F401


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(data=st.data())
def test_checkpointed_case(name, data):
    def case(net, x):
        def run(x):
            net.count = 0
            return CASES[name](net, x)

        return checkpoint(run, x, use_reentrant=False)

    compare(case, data)
    assert not fallback_report()


def make_layers(dropout):
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(3, 3), nn.Dropout(dropout), nn.Tanh()) for _ in range(3)]


def compare_checkpointed(layers, reentrant=False):
    """Gradients of the input and all weights, dense and row-sparse."""
    x = torch.randn(6, 3, requires_grad=True)
    gradients = []
    for take in (lambda v: v[KEPT], lambda v: take_rows_sparse(v, KEPT)):
        torch.manual_seed(1)
        hidden = x
        for layer in layers:
            layer.zero_grad()
            hidden = checkpoint(layer, hidden, use_reentrant=reentrant)
        x.grad = None
        take(hidden.square().sum(1)).mean().backward()
        gradients.append([x.grad, *(p.grad.clone() for layer in layers for p in layer.parameters())])
    for a, b in zip(*gradients, strict=True):
        close(a, b)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing(reentrant, dropout, recomputed):
    compare_checkpointed(make_layers(dropout), reentrant)
    assert recomputed == {"kept": 0 if reentrant else 3, "all": 0}


def test_checkpointed_function_that_mixes_samples(recomputed):
    class Mixing(nn.Module):
        def forward(self, x):
            return (x - x.mean(0)).sin()

    first, *layers = make_layers(0.5)
    compare_checkpointed([first, Mixing(), *layers])
    assert recomputed == {"kept": 2, "all": 1}  # what comes after the failure does not try


def test_checkpointed_op_without_a_gradient_rule(recomputed, monkeypatch):
    """The op then needs all rows of what was recomputed."""
    monkeypatch.setitem(GRADIENTS, torch.ops.aten.tanh_backward.default, dense_rule)
    compare_checkpointed(make_layers(0.5))
    assert fallback_report()
    assert recomputed == {"kept": 1, "all": 0}


def test_checkpoints_serve_several_selections_and_a_plain_loss():
    layer, x = make_layers(0.5)[0], torch.randn(6, 3, requires_grad=True)
    hidden = checkpoint(layer, checkpoint(layer, x, use_reentrant=False), use_reentrant=False)
    values, second_kept = hidden.square().sum(1), torch.tensor([0, 1, 5])
    losses = [lambda: values[KEPT].sum(), lambda: values[second_kept].mean(), lambda: values.sum()]
    expected = [torch.autograd.grad(loss(), x, retain_graph=True)[0] for loss in losses]
    first, second = take_rows_sparse(values, KEPT).sum(), take_rows_sparse(values, second_kept).mean()
    close(torch.autograd.grad(first, x, retain_graph=True)[0], expected[0])
    close(torch.autograd.grad(values.sum(), x, retain_graph=True)[0], expected[2])
    close(torch.autograd.grad(second, x, retain_graph=True)[0], expected[1])
    close(torch.autograd.grad(first + second + values.sum(), x)[0], sum(expected))


def test_recomputed_activations_are_freed_layer_by_layer():
    layers, alive, most = make_layers(0.0) * 4, weakref.WeakSet(), []

    class Counted(nn.Module):
        def forward(self, x):
            hidden = x.sin()
            if isinstance(hidden, ActivationRows):
                alive.add(hidden)
                most.append(len(alive))
            return hidden.cos()

    gc.disable()
    try:
        compare_checkpointed([nn.Sequential(layer, Counted()) for layer in layers])
    finally:
        gc.enable()
    assert len(most) == 12 and max(most) <= 2
