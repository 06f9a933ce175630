"""
Where a tape runs and where the engine does: hooks, kinds of backward passes, memory, wrong tapes, several processes.
"""

import logging
import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

from hf_trim.backward import fallback_report, strict, take_rows_sparse, taped
from hf_trim.backward.tape import extension, recorder, tapes
from tests.support.quick import BUILD
from tests.support.taped import STEPS, C, Net, inputs, kept_in, run


pytestmark = pytest.mark.usefixtures("counts")


# ---- hooks and kinds of backward passes ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hidden", "retain_grad", "node", "node's prehook", "leaf", "module"])
def test_hooks(kind, counts):
    """They see the gradients of a step, once: no tape runs."""
    net, calls = Net(), []

    def losses(step):
        hidden = net.hidden(inputs(step))
        if kind == "hidden":
            hidden.register_hook(lambda grad: calls.append(grad.shape))
        elif kind == "retain_grad":
            hidden.retain_grad()
            calls.append(weakref.ref(hidden))
        elif kind == "node":
            hidden.grad_fn.register_hook(lambda *_: calls.append(step))
        elif kind == "node's prehook":
            hidden.grad_fn.register_prehook(lambda *_: calls.append(step))
        return net.second(hidden).pow(2).mean((1, 2))

    if kind == "leaf":
        net.first.weight.register_hook(lambda grad: calls.append(grad.shape) or grad * 2)
    if kind == "module":
        net.second.register_full_backward_hook(lambda *_: calls.append(None))
    run(losses, net.parameters())
    assert len(calls) == 2 * STEPS and not counts["ran"]


def test_post_accumulate_hooks(counts):
    """As in an optimizer that runs inside the backward pass."""
    net, calls = Net(), []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.abs().sum().isfinite()))
    run(lambda step: net(inputs(step)), net.parameters())
    assert len(calls) == 2 * STEPS * len([*net.parameters()]) and counts["ran"] == STEPS - 3


def test_optimizer_in_the_backward_pass(counts):
    """A weight changes as soon as its gradient is there; what is computed with it must have been computed before."""
    layers, scales = nn.ModuleList(Net() for _ in range(3)), nn.ParameterList(torch.randn(C, C) for _ in range(3))
    parameters = [*layers.parameters(), *scales]
    before = [p.detach().clone() for p in parameters]

    def change(p):
        with torch.no_grad():
            p.add_(p.grad, alpha=10)

    def losses(step):
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
        x = inputs(step)
        for layer, scale in zip(layers, scales, strict=True):
            x = layer.second(layer.hidden(x) @ scale)  # of the two, the gradient of the scale is computed first
        return x.mean((1, 2))

    for p in parameters:
        p.register_post_accumulate_grad_hook(change)
    run(losses, parameters)
    assert counts["ran"] == STEPS - 3


def test_weight_that_is_changed_too_early(counts):
    """Autograd refuses to use a weight that an optimizer inside the backward pass has changed, and so does a tape."""
    net, lower = Net(), Net()

    def backward_of(step):
        with taped():
            take_rows_sparse(net(lower.hidden(inputs(step))), kept_in(step)).sum().backward()

    for step in range(5):
        backward_of(step)
    assert counts["ran"] == 2
    net.second.weight.register_post_accumulate_grad_hook(lambda p: _bump(net.first))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward_of(5)
    assert counts["ran"] == 3


def _bump(layer):
    with torch.no_grad():
        layer.weight.add_(1)


def test_hooks_that_come_when_a_tape_is_in_use(counts):
    net, calls = Net(), []

    def losses(step):
        hidden = net.hidden(inputs(step))
        if step >= 4:
            hidden.register_hook(lambda grad: calls.append(step) or grad * 3)
        return net.second(hidden).pow(2).mean((1, 2))

    run(losses, net.parameters(), steps=8)
    assert len(calls) == 8 and counts["ran"] == 1


def test_module_whose_backward_is_python(counts):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            assert type(grad) is torch.Tensor
            return grad * 2

    net = Net()
    run(lambda step: net(Double.apply(net.hidden(inputs(step)))), net.parameters())
    assert not counts["ran"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, counts):
    net = Net()

    def losses(step):
        x = inputs(step, requires_grad=True)
        return net(torch.utils.checkpoint.checkpoint(net.hidden, x, use_reentrant=reentrant))

    run(losses, net.parameters())
    assert len(counts) == 1 and counts.total() == STEPS  # the reason why not: nothing is recorded


def test_graph_is_kept(counts):
    """The second time there are gradients again, of the same graph."""
    net = Net()

    def backward(loss):
        loss.backward(retain_graph=True)
        loss.backward()

    run(lambda step: net(inputs(step)), net.parameters(), backward=backward)


def test_second_derivatives(counts):
    net = Net()

    def backward(loss):
        grads = torch.autograd.grad(loss, [*net.parameters()], create_graph=True)
        sum(grad.pow(2).sum() for grad in grads).backward()

    run(lambda step: net(inputs(step)), net.parameters(), backward=backward)
    assert not counts["recorded"]


@pytest.mark.parametrize("which", ["all", "some", "hidden"])
def test_gradients_that_are_asked_for(which, counts):
    net, hidden = Net(), []

    def losses(step):
        hidden[:] = [net.hidden(inputs(step))]
        return net.second(hidden[0]).pow(2).mean((1, 2))

    def backward(loss):
        wanted = {"all": [*net.parameters()], "some": [net.first.weight], "hidden": hidden}[which]
        for p, grad in zip(wanted, torch.autograd.grad(loss, wanted), strict=True):
            if which == "hidden":
                net.first.weight.grad = grad.mean() * torch.ones(C, C)
            else:
                p.grad = grad

    run(losses, net.parameters(), backward=backward)
    assert counts["ran"] == (STEPS - 3 if which == "all" else 0)


def test_losses_with_other_parts(counts):
    """A second loss on the same layers, dense or sparse, with the same kept rows or others."""
    net = Net()

    def run_parts(second):
        def losses(step):
            hidden = net.hidden(inputs(step))
            parts.append(second(hidden.cos().mean((1, 2)), step))
            return net.second(hidden).pow(2).mean((1, 2))

        parts = []
        run(losses, net.parameters(), backward=lambda loss: (loss + parts.pop()).backward())

    run_parts(lambda x, step: x.sum())
    assert counts["ran"] == STEPS - 3
    run_parts(lambda x, step: take_rows_sparse(x, kept_in(step + 1)).sum())


def test_tensor_that_was_changed_in_place(counts):
    net, weight = Net(), nn.Parameter(torch.randn(C))
    for step in range(6):
        hidden = net.hidden(inputs(step)) * weight
        with taped():
            loss = take_rows_sparse((hidden.exp() * weight).sum((1, 2)), kept_in(step)).sum()
        if step == 5:
            with torch.no_grad():
                weight.add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            loss.backward()
    assert counts["ran"] == 2


def test_graph_that_was_freed(counts):
    net = Net()
    for step in range(6):
        with taped():
            loss = take_rows_sparse(net(inputs(step)), kept_in(step)).sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


def test_anomaly_mode(counts):
    net = Net()

    def backward(loss):
        with torch.autograd.set_detect_anomaly(True):
            loss.backward()

    run(lambda step: net(inputs(step)), net.parameters(), backward=backward)
    assert not counts["recorded"]


# ---- memory -------------------------------------------------------------------------------------------------------


def test_memory_is_freed_on_the_way(counts):
    """When the first layer's gradient is there, what the last ones saved is gone."""
    layers = nn.ModuleList(Net() for _ in range(4))
    alive = []
    for step in range(5):
        x, saved = inputs(step), []
        for layer in layers:
            x = layer.hidden(x).tanh()
            saved.append(weakref.ref(x.untyped_storage()))
        with taped():
            loss = take_rows_sparse(x.mean((1, 2)), kept_in(step)).sum()
        del x
        left = []
        handles = [
            layer.first.weight.register_post_accumulate_grad_hook(
                lambda p, refs=saved, left=left: left.append(sum(ref() is not None for ref in refs))
            )
            for layer in layers
        ]
        loss.backward()
        for handle in handles:
            handle.remove()
        alive.append(left)
    assert counts["ran"] == 2
    assert alive[-1] == alive[0] and alive[0][-1] < alive[0][0]


def test_nothing_is_left_of_a_step(counts):
    net = Net()
    for step in range(6):
        x = inputs(step)
        hidden = net.hidden(x)
        refs = [weakref.ref(x), weakref.ref(hidden)]
        with taped():
            loss = take_rows_sparse(net.second(hidden).pow(2).mean((1, 2)), kept_in(step)).sum()
        loss.backward()
        del x, hidden, loss
        assert not any(ref() is not None for ref in refs), step


# ---- wrong tapes --------------------------------------------------------------------------------------------------


def test_a_wrong_tape_is_not_used(counts, monkeypatch, caplog):
    """The third step compares, and has the right gradients."""
    monkeypatch.setattr(recorder.Recorder, "_argument", _halve(recorder.Recorder._argument))
    net = Net()
    with caplog.at_level(logging.ERROR, "hf_trim"):
        run(lambda step: net(inputs(step)), net.parameters())
    assert counts["another gradient"] == 1 and not counts["ran"]
    assert len(caplog.records) == 1


def _halve(argument):
    def halved(self, value):
        return ("constant", value / 2) if isinstance(value, float) else argument(self, value)

    return halved


def test_numbers_that_are_not_finite_prove_nothing(counts):
    net = Net()
    run(lambda step: net(inputs(step)) * (torch.inf if step == 2 else 1), [], steps=6)
    assert counts["compared"] == 1 and counts["ran"] == 2


def test_ops_that_run_dense(counts):
    """They are counted as without a tape, and an error in `strict`."""
    net = Net()

    def losses(step):
        return net(net.hidden(inputs(step)).cumsum(0))

    run(losses, net.parameters())
    assert not counts["ran"] and fallback_report()["aten.flip.default"] == STEPS
    with strict(), pytest.raises(RuntimeError, match="no row-sparse rule"):
        run(losses, net.parameters(), steps=1)


def test_graphs_without_a_tape_are_not_recorded_again_and_again(counts, monkeypatch):
    """As with layers that are left out at random: more graphs come again than are remembered."""
    monkeypatch.setattr(tapes, "MOST_TAPES", 2)
    made = []
    monkeypatch.setattr(tapes, "Recorder", lambda *args: made.append(None) or recorder.Recorder(*args))
    net = Net()
    run(lambda step: net(net.hidden(inputs(step)[:, : 1 + step % 4]).cumsum(0)), net.parameters(), steps=20)
    assert len(made) == 2 and counts == {"an op ran dense": 2}


def test_tapes_are_few(counts, monkeypatch):
    monkeypatch.setattr(tapes, "MOST_TAPES", 2)
    monkeypatch.setattr(tapes, "MOST_SEEN", 3)
    net = Net()
    run(lambda step: net(inputs(step)[:, : 1 + step % 4]), net.parameters(), steps=12)
    assert not counts["recorded"]  # each was forgotten before it came again
    run(lambda step: net(inputs(step)[:, : 1 + step % 2]), net.parameters(), steps=12)
    assert counts["ran"] == 6


def test_without_the_library(counts, monkeypatch):
    monkeypatch.setattr(tapes.EXTENSION, "get", lambda: None)
    net = Net()
    run(lambda step: net(inputs(step)), net.parameters())
    assert not counts


# ---- processes ----------------------------------------------------------------------------------------------------


@pytest.mark.extended
def test_gradients_of_several_processes():
    """They are the mean of both processes' gradients, and are sent while the tape runs."""
    done = subprocess.run([sys.executable, "-m", "tests.support.taped_processes"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the library --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["no compiler", "broken"])
def test_library_that_cannot_be_had(kind, tmp_path, monkeypatch, caplog):
    """It is said once, and all goes on without it."""
    (tmp_path / "build.py").write_text("raise SystemExit(1)")
    library = tmp_path / "library.so"
    if kind == "broken":
        library.write_text("no library")
    monkeypatch.setattr(extension, "_FOLDER", tmp_path)
    monkeypatch.setattr(extension, "library_path", lambda: library)
    own = extension.Extension()
    with caplog.at_level(logging.INFO, "hf_trim"):
        assert own.get(wait=True) is None and own.get() is None
    (said,) = caplog.messages
    assert "Training goes on without it" in said and str(library) in said


def test_library_is_built_by_one_process(tmp_path, monkeypatch):
    (tmp_path / "build.py").write_text("import sys\nopen(sys.argv[1] + '.begun', 'w')")
    monkeypatch.setattr(extension, "_FOLDER", tmp_path)
    monkeypatch.setattr(extension, "library_path", lambda: tmp_path / "library.so")
    monkeypatch.setattr(extension.Extension, "_build_it", BUILD)
    first, second = extension.Extension(), extension.Extension()
    assert first.get() is None and second.get() is None
    assert first._build is not None and second._build is None
    assert first._build.wait() == 0 and (tmp_path / "library.so.begun").exists()
    os.utime(tmp_path / "library.building", (0, 0))  # that process was killed long ago
    assert second.get() is None and second._build is not None and second._build.wait() == 0


@pytest.mark.extended
def test_build(tmp_path):
    library = tmp_path / "folder" / "library.so"
    subprocess.run([sys.executable, extension.__file__.replace("extension", "build"), str(library)], check=True)
    assert library.stat().st_size > 10000
