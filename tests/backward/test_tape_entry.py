"""Where a tape begins: behind several losses of the same samples it does where they have met."""

import weakref

import pytest
import torch
from torch import nn

from hf_trim.backward import fallback_report, skip_zero_rows, take_rows_sparse, taped
from hf_trim.backward.eager.sparse import _TakeRows, prepare_rows
from hf_trim.backward.tape import entry
from tests.support.taped import B, C, Net, inputs, kept_in


LOSSES = {
    "ends of a span": lambda net, hidden, scale: [x.pow(2).sum(1) for x in net.second(hidden)[..., :2].unbind(-1)],
    "a weight of one of them": lambda net, hidden, scale: [hidden.sin().mean((1, 2)), (hidden * scale).mean((1, 2))],
    "a weight that the model has too": lambda net, hidden, scale: [
        net.second(hidden).mean((1, 2)), (hidden @ net.second.weight).cos().mean((1, 2)),
    ],
    "one behind the other": lambda net, hidden, scale: [hidden.mean((1, 2)), net.second(hidden).sin().mean((1, 2))],
    "three": lambda net, hidden, scale: [*hidden.sin()[..., :3].mean(1).unbind(1)],
    "a power": lambda net, hidden, scale: [hidden.mean((1, 2)).pow(3)],
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_the_same_samples(name, counts):
    net, scale = Net(), nn.Parameter(torch.randn(C))
    parameters, steps = [*net.parameters(), scale], 8
    for step in range(steps):
        kept, grads = kept_in(step, k=2 + step % 3), []
        for is_sparse in (False, True):
            for p in parameters:
                p.grad = None
            torch.manual_seed(step)
            losses = LOSSES[name](net, net.hidden(inputs(step)), scale)
            with taped():
                rows = prepare_rows(losses, kept, B) if is_sparse else None
                parts = [x[kept] if rows is None else _TakeRows.apply(x, rows) for x in losses]
            sum((i + 1.0) * part.sum() for i, part in enumerate(parts)).backward()
            grads.append([p.grad for p in parameters])
        for want, got in zip(*grads, strict=True):
            assert (want is None) == (got is None)
            if want is not None:
                torch.testing.assert_close(got, want)
    assert counts == {"recorded": 2, "compared": 1, "ran": 4} and not fallback_report()


def test_losses_that_never_meet(counts, monkeypatch):
    """Each has layers of its own: the engine runs."""
    monkeypatch.setattr(entry, "_MOST_BEFORE", 8)
    nets = nn.ModuleList([Net(), Net()])
    for step in range(5):
        losses, kept = [net(inputs(step)) for net in nets], kept_in(step)
        want = torch.autograd.grad(sum(x[kept].sum() for x in losses), [*nets.parameters()], retain_graph=True)
        with taped():
            rows = prepare_rows(losses, kept, B)
            sum(_TakeRows.apply(x, rows).sum() for x in losses).backward()
        for p, grad in zip(nets.parameters(), want, strict=True):
            torch.testing.assert_close(p.grad, grad)
        nets.zero_grad()
    assert not counts


def test_one_of_two_losses_has_a_gradient(counts):
    net = Net()
    for step in range(9):
        losses, kept = net.second(net.hidden(inputs(step))).mean(1)[:, :2].unbind(1), kept_in(step)
        wanted = losses[step % 2]
        want = torch.autograd.grad(wanted[kept].sum(), [*net.parameters()], retain_graph=True)
        with taped():
            rows = prepare_rows(losses, kept, B)
            _TakeRows.apply(wanted, rows).sum().backward()
        for p, grad in zip(net.parameters(), want, strict=True):
            torch.testing.assert_close(p.grad, grad)
        net.zero_grad()
    assert counts["ran"]


def test_nothing_holds_a_graph(counts):
    """The hook at the entry must not hold its own node."""
    net = Net()
    for step in range(4):
        x = inputs(step)
        reference = weakref.ref(x)
        with taped():
            loss = take_rows_sparse(net(x), kept_in(step)).sum()
        if step % 2:
            loss.backward()
        del x, loss
        assert reference() is None
    assert not counts["ran"]


def test_rows_that_are_zero_by_themselves(counts):
    """How many they are is seen in the backward pass: the tape is for all numbers."""
    net = Net()
    for step in range(8):
        grads = []
        for skip in (lambda x: x, skip_zero_rows):
            net.zero_grad()
            torch.manual_seed(step)
            weights = torch.zeros(B, 1, 1).index_fill_(0, kept_in(step, k=2 + step % 3), 1.0)
            with taped():
                (skip(net.second(net.hidden(inputs(step)))) * weights).pow(2).sum().backward()
            grads.append([p.grad for p in net.parameters()])
        torch.testing.assert_close(*grads)
    assert counts == {"recorded": 2, "compared": 1, "ran": 4}
