"""Compiled backward graphs on the kept rows: gradients of the dense pass, no recompilation, and what is refused."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from hf_trim import trimmed_mean
from hf_trim.backward._compile_internals import aot_backward_graph, aot_function
from hf_trim.backward.compiled import graph, plan, symbols
from hf_trim.backward.compiled.backend import keep_backward_graphs
from hf_trim.backward.compiled.proof import Proof
from hf_trim.backward.eager.sparse import take_rows_sparse
from hf_trim.backward.settings import checked, fallback_report, refused_graphs, strict
from tests.support.compiled import DECOMPOSED, Do, Net, check, dense_take, gradients_of, net_losses, step
from tests.support.helpers import relative_difference
from tests.support.models import KEPT, TRANSFORMERS, build, difference, gradients


pytestmark = pytest.mark.usefixtures("fresh_compiler")


# ---- shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [(3,), (0, 1), (0, 4)])
def test_inductor(kept, runs):
    check(Net(), runs, net_losses, kept, backend="hf_trim")


@pytest.mark.parametrize("backend", ["hf_trim", "aot_eager"])
def test_nothing_is_compiled_anew_over_a_schedule(backend, runs):
    net = Net()
    call = torch.compile(net, backend=backend, dynamic=True)
    x, labels = torch.randn(20, 3, 2, 2), torch.randint(0, 3, (20,))
    keeps = [1.0, *(1 - 0.8 * epoch / 19 for epoch in range(20))]
    for keep in keeps:
        for size in (20, 11):  # the last mini-batch of an epoch is short
            inputs = x[:size].clone(), labels[:size].clone()
            grads = step(call, net, *inputs, keep)
            expected = step(call, net, *inputs, keep, dense_take)
            assert relative_difference(grads, expected) <= 1e-5
            if keep == 1.0:
                graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs == 1
    assert len(runs) == 29 and {kept for kept, _ in runs} >= {2, 4, 8, 16}  # above p = 0.8 it is dense


def test_a_single_row_runs_as_two():
    """Graphs for any batch size are not made for one sample."""
    net = Net()
    call = torch.compile(net, backend="aot_eager", dynamic=True)
    x, labels = torch.randn(6, 3, 2, 2), torch.tensor([0, 1, 2] * 2)
    expected = step(call, net, x, labels, 0.1, dense_take)
    assert relative_difference(step(call, net, x, labels, 0.1), expected) <= 1e-5


def test_lengths_may_vary(runs):
    net = Net()
    call = torch.compile(net, backend=DECOMPOSED, dynamic=True)
    labels = torch.tensor([0, 1, 2] * 2)
    for length in (7, 4, 6):  # 6 is the batch size
        x = torch.randn(6, 3, length)
        expected = step(call, net, x, labels, 0.5, dense_take)
        assert relative_difference(step(call, net, x, labels, 0.5), expected) <= 1e-5
    assert not refused_graphs() and len(runs) == 3 and counters["stats"]["unique_graphs"] <= 2


@pytest.mark.extended
def test_tokens_in_front_of_samples(runs):
    """torch's own attention computes on [T, B, C], and merges that to [T * B, C]."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.tokens = nn.Parameter(torch.randn(5, 8))

        def forward(self, x):
            return self.layer(x[:, None] + self.tokens).flip(1)[:, 0]

    check(Net(Tokens()), runs, net_losses)


def test_graph_breaks_make_several_graphs(runs):
    class Break(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x.sin()

    check(Net(Break()), runs, net_losses, graphs=3)  # before, in and after the module


def test_compiled_layers_in_an_eager_model(runs):
    model = build(TRANSFORMERS["bert"])
    for layer in model.bert.encoder.layer:
        layer.compile(backend=DECOMPOSED, dynamic=True)
    kept = torch.tensor(KEPT)
    dense = gradients(model, lambda losses: losses[kept])
    sparse = gradients(model, lambda losses: take_rows_sparse(losses, kept))
    assert not fallback_report() and len(runs) == 2
    assert difference(sparse, dense) <= 1e-5


def test_checkpointing_in_the_graph(runs):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU())

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    check(Net(Checkpointed()), runs, net_losses)


def test_a_graph_may_be_run_backward_twice():
    net = Net()
    call = torch.compile(net, backend="aot_eager", dynamic=True)
    x, labels = torch.randn(6, 3, 2, 2), torch.tensor([0, 1, 2] * 2)
    with torch._functorch.config.patch(donated_buffer=False):  # as torch.compile asks for
        loss = take_rows_sparse(F.cross_entropy(call(x), labels, reduction="none"), torch.tensor([1, 4])).mean()
        loss.backward(retain_graph=True)
        once = gradients_of(net)
        loss.backward()
    assert relative_difference(gradients_of(net), 2 * once) <= 1e-6
    assert not refused_graphs()


@pytest.mark.parametrize("backend", ["aot_eager", DECOMPOSED])
def test_saved_row_numbers_are_looked_at_unless_they_are_known(backend, runs, monkeypatch):
    """On a GPU the host waits for the look."""
    looks, look = [], graph.holds_row_numbers
    monkeypatch.setattr(graph, "holds_row_numbers", lambda index: looks.append(None) or look(index))

    def last(numbers):
        return Do(lambda x: x.unflatten(1, (2, 4))[numbers(len(x)), 1].repeat(1, 2))

    with checked(False):
        check(Net(last(torch.arange)), runs, net_losses, backend=backend)
        assert not looks
        runs.clear()
        check(Net(last(lambda n: torch.arange(1, n + 1) - 1)), runs, net_losses, backend=backend)
        assert len(looks) == 1


def test_one_line_in_a_loop_without_a_trainer(runs):
    net = Net()

    @torch.compile(backend="hf_trim", dynamic=True)
    def losses_of(x, labels):
        return F.cross_entropy(net(x), labels, reduction="none")

    x, labels = torch.randn(6, 3, 2, 2), torch.tensor([0, 1, 2] * 2)
    grads = []
    for backward in ("dense", "sparse"):
        net.zero_grad()
        torch.manual_seed(1)
        trimmed_mean(losses_of(x, labels), 0.5, backward=backward).backward()
        grads.append(gradients_of(net))
    assert relative_difference(*grads) <= 1e-5 and runs == [(3, 3)]


# ---- what is refused ---------------------------------------------------------------------------------------------


def by_row_number(x):
    return x * torch.arange(x.shape[0])[:, None]


def rows_merged_in_front(x):
    """Each row twice, all first ones in front: which of `[2 * B]` are a row's is not in the shape."""
    both = torch.stack([x, x.sin()]).flatten(0, 1)
    return (both * torch.cat([x, x]).exp()).unflatten(0, (2, -1)).sum(0)


def by_parity(x):
    """What is merged behind rows meets what is merged in front: a row's number decides which of the two it gets."""
    both = torch.stack([x, x.sin()]).flatten(0, 1)
    weights = torch.tensor([1.0, 3.0])[None].expand(len(x), 2).reshape(-1, 1)
    return (both * weights).unflatten(0, (2, -1)).sum(0)


MIXING = {
    "parity": (Do(by_parity), "different places|a view splits the rows|a constant"),
    "batch norm": (nn.BatchNorm1d(8), "terms may be nonzero|all rows together|mixes the rows"),
    "mean": (Do(lambda x: x - x.mean(0)), "terms may be nonzero|depends on the batch size"),
    "softmax": (Do(lambda x: x.softmax(0)), "along the rows|terms may be nonzero"),
    "shift": (Do(lambda x: x.roll(1, 0) * x), "along the rows|depends on the batch size"),
    "part": (Do(lambda x: torch.cat([x[:1].sin(), x[1:]])), "a part of the rows|joins rows"),
    "pairs": (Do(lambda x: (x @ x.T).tanh() @ x), "in different dimensions|two dimensions"),
    "size": (Do(lambda x: x.sin() * x.shape[0]), "depends on the batch size"),
    "other numbers": (Do(lambda x: x.sin()[torch.arange(x.shape[0]).flip(0)]), "entries of other rows"),
    "cumsum": (Do(lambda x: x.cumsum(0)), "along the rows|has no rule"),
}


@pytest.mark.parametrize("backend", [DECOMPOSED, "aot_eager"])
@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_rows_runs_dense(name, backend, runs, caplog):
    middle, reason = MIXING[name]
    net = Net(middle)
    call = torch.compile(net, backend=backend, dynamic=True)
    x, labels = torch.randn(6, 3, 2, 2), torch.tensor([0, 1, 2] * 2)
    expected = step(call, net, x, labels, 0.5, dense_take)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert relative_difference(step(call, net, x, labels, 0.5), expected) <= 1e-5
    assert not runs
    assert sum(refused_graphs().values()) == 2 and len(refused_graphs()) == 1
    warnings = [record.message for record in caplog.records if "runs on the whole batch" in record.message]
    assert len(warnings) == 1
    assert any(part in warnings[0] for part in reason.split("|")), warnings
    assert list(fallback_report().values()) == [2]
    with strict(), pytest.raises(RuntimeError, match="cannot run on the kept rows"):
        step(call, net, x, labels, 0.5)


@pytest.mark.parametrize("backend", [DECOMPOSED, "aot_eager"])
@pytest.mark.parametrize("function", [by_row_number, rows_merged_in_front])
def test_what_only_some_graphs_tell_is_exact_or_refused(function, backend, runs):
    net = Net(Do(function))
    call = torch.compile(net, backend=backend, dynamic=True)
    x, labels = torch.randn(6, 3, 2, 2), torch.tensor([0, 1, 2] * 2)
    expected = step(call, net, x, labels, 0.5, dense_take)
    assert relative_difference(step(call, net, x, labels, 0.5), expected) <= 1e-5
    assert bool(runs) != bool(refused_graphs())


def test_frozen_batch_norm_does_not_mix(runs):
    check(Net(nn.BatchNorm1d(8).eval()), runs, net_losses)


def test_a_graph_for_one_batch_size(runs):
    net = Net()
    call = torch.compile(net, backend="aot_eager", dynamic=False)
    x, labels = torch.randn(6, 3, 2, 2), torch.tensor([0, 1, 2] * 2)
    expected = step(call, net, x, labels, 0.5, dense_take)
    assert relative_difference(step(call, net, x, labels, 0.5), expected) <= 1e-6
    assert not runs and "for one batch size" in next(iter(refused_graphs()))


def test_a_length_that_equals_the_batch_size_by_chance(runs):
    """Sizes that are equal at first share a symbol in an ordinary backend, and not in ours."""
    for backend, told_apart in (("aot_eager", False), ("hf_trim", True)):
        torch._dynamo.reset()
        net = Net()
        call = torch.compile(net, backend=backend, dynamic=True)
        x, labels = torch.randn(6, 3, 6), torch.tensor([0, 1, 2] * 2)
        if told_apart:
            with keep_backward_graphs():
                expected = step(call, net, x, labels, 0.5, dense_take)
        else:
            expected = step(call, net, x, labels, 0.5, dense_take)
        assert relative_difference(step(call, net, x, labels, 0.5), expected) <= 1e-5
    assert bool(runs)


def test_a_graph_without_guards_for_a_number_of_rows_runs_dense(monkeypatch):
    monkeypatch.setattr(symbols, "MAX_PADDING", -10)
    net = Net()
    call = torch.compile(net, backend="aot_eager", dynamic=True)
    x, labels = torch.randn(6, 3, 2, 2), torch.tensor([0, 1, 2] * 2)
    expected = step(call, net, x, labels, 0.5, dense_take)
    assert relative_difference(step(call, net, x, labels, 0.5), expected) <= 1e-6
    assert "batch sizes that 3 is not one of" in next(iter(refused_graphs()))


def test_a_proof_that_is_wrong_is_found_out(monkeypatch, caplog):
    """The last line of defence: the first gradients are compared with the dense ones."""
    prove = plan.prove

    def believe(graph, batch, zeros) -> Proof:
        proof = prove(graph, batch, zeros)
        proof.reason = ""
        return proof

    monkeypatch.setattr(plan, "prove", believe)
    x, labels = torch.randn(6, 3, 2, 2), torch.tensor([0, 1, 2] * 2)
    for on in (False, True):
        torch._dynamo.reset()
        net = Net(Do(lambda x: x - x.mean(0) * 2))
        call = torch.compile(net, backend="aot_eager", dynamic=True)
        expected = step(call, net, x, labels, 0.5, dense_take)
        with checked(on), caplog.at_level(logging.ERROR):
            error = relative_difference(step(call, net, x, labels, 0.5), expected)
        assert error <= 1e-5 if on else error > 1e-2
        assert ("gave other gradients than on the whole batch" in caplog.text) == on
    assert "gave other gradients" in next(iter(refused_graphs()))


def test_the_cache_leaves_no_graph(monkeypatch):
    net = Net()
    call = torch.compile(net, backend="aot_eager", dynamic=True)
    x, labels = torch.randn(6, 3, 2, 2), torch.tensor([0, 1, 2] * 2)
    losses = F.cross_entropy(call(x), labels, reduction="none")
    node = losses.grad_fn.next_functions[0][0].next_functions[0][0]
    for traced in aot_backward_graph(aot_function(node)).nodes:
        traced.meta = {}
    expected = step(call, net, x, labels, 0.5, dense_take)
    assert relative_difference(step(call, net, x, labels, 0.5), expected) <= 1e-6
    assert "backend='hf_trim' compiles without that cache" in next(iter(refused_graphs()))
