"""Gradients that a user gets hold of are those of dense autograd, and so is what a hook makes of them."""

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_trim.backward.eager.sparse import take_rows_sparse
from hf_trim.backward.eager.tensor import RowSparseTensor, densify
from hf_trim.backward.settings import strict
from tests.support.rule_cases import KEPT


SHAPE = (6, 3, 4)  # of x, [B, T, C]


class Network(nn.Module):
    """`x` → losses `[B]`, with the activation `hidden` `[B, T, C]` on the way."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.to(torch.double)

    def forward(self, x):
        self.hidden = self.first(x).tanh()
        return self.second(self.hidden).square().sum((1, 2))


def run(watch=None, backward=lambda net, x, loss: loss.backward(), before=None):
    """
    A dense and a row-sparse backward pass of the same network and input.

    Args:
        watch (`Callable`, *optional*): Called with network and input after the forward pass.
        backward (`Callable`, *optional*): Runs the backward pass of network, input and loss.
        before (`Callable`, *optional*): Called with network and input before the forward pass.

    Returns:
        `list`: For each, what `backward` returned, else the gradients of the input and all parameters.
    """
    results = []
    for take in (lambda losses: losses[KEPT], lambda losses: take_rows_sparse(losses, KEPT)):
        net, x = Network(), torch.linspace(-1, 1, 72, dtype=torch.double).view(SHAPE).requires_grad_()
        if before is not None:
            before(net, x)
        losses = net(x)
        if watch is not None:
            watch(net, x)
        result = backward(net, x, take(losses).sum())
        results.append([x.grad, *(p.grad for p in net.parameters())] if result is None else result)
    return results


def compare(dense, sparse):
    assert all(type(grad) is torch.Tensor for grad in sparse)
    torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-10)


# ---- hooks ---------------------------------------------------------------------------------------------------------


def set_entries(index, value):
    return lambda grad: grad.__setitem__(index, value)


RETURN = {
    "multiplies": lambda grad: grad * 2,
    "clips": lambda grad: grad.clamp(-0.1, 0.1) / (1 + grad.norm()),
    "makes anew": lambda grad: torch.linspace(0, 1, 72).view(SHAPE).double(),
    "adds": lambda grad: grad + 1,
    "mixes samples": lambda grad: grad - grad.mean(0) + grad.flip(0),
    "normalizes each": lambda grad: torch.stack([part / (1 + part.norm()) for part in grad]),
    "looks up": lambda grad: grad[grad.flatten(1).norm(dim=1).argsort()],
}
CHANGE = {
    "mul_": lambda grad: grad.mul_(2),
    "add_": lambda grad: grad.add_(1),
    "add_ a tensor": lambda grad: grad.add_(torch.ones(4).double()),
    "copy_": lambda grad: grad.copy_(torch.ones(4)),
    "uniform_": lambda grad: torch.manual_seed(0) and grad.uniform_(),
    "clamp_": lambda grad: grad.clamp_(-0.1, 0.1),
    "data": lambda grad: grad.data.mul_(2),
    "out": lambda grad: torch.add(grad, 1, out=grad),
    "_foreach_mul_": lambda grad: torch._foreach_mul_([grad], 2.0),
    "_foreach_add_": lambda grad: torch._foreach_add_([grad, torch.ones(2)], 2.0),
    "_foreach_lerp_": lambda grad: torch._foreach_lerp_([grad], [torch.ones(SHAPE).double()], 0.5),
    "zeros": set_entries((slice(None), 1), 0),
    "a sample": set_entries(1, 3.0),
    "samples": set_entries(slice(1, 3), 3.0),
    "an entry": set_entries((4, 0, 1), 3.0),
    "a part": set_entries((slice(2, 5), 0, slice(1, 3)), 3.0),
    "where": lambda grad: set_entries(grad > 0, 3.0)(grad),
    "each sample": lambda grad: [part.mul_(i) for i, part in enumerate(grad)],
    "memory": lambda grad: torch.from_dlpack(grad).add_(1),
    "each entry": lambda grad: grad.apply_(lambda value: value + 1),
}


def returning_nothing(change):
    def hook(grad):
        change(grad)

    return hook


HOOKS = {"read": returning_nothing(lambda grad: grad.norm().item())}
HOOKS |= {f"return, {name}": hook for name, hook in RETURN.items()}
HOOKS |= {f"in place, {name}": returning_nothing(change) for name, change in CHANGE.items()}


@pytest.mark.parametrize("name", HOOKS)
def test_hook_of_an_activation(name):
    compare(*run(lambda net, x: net.hidden.register_hook(HOOKS[name])))


@pytest.mark.parametrize("name", HOOKS)
def test_hook_of_a_leaf(name):
    compare(*run(lambda net, x: x.register_hook(HOOKS[name])))


def test_leaves_hand_out_ordinary_tensors():
    seen = []

    def see(grad):
        seen.append(grad)

    def watch(net, x):
        x.register_hook(see)
        net.first.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad))

    compare(*run(watch))
    assert [type(grad) for grad in seen] == [torch.Tensor] * 4
    compare(*run(backward=lambda net, x, loss: torch.autograd.grad(loss, [x, *net.parameters()])))


def test_a_change_that_would_not_reach_a_view_is_refused():
    for change in (set_entries((slice(None), 1), 3.0), lambda grad: grad.detach().add_(1)):
        with pytest.raises(RuntimeError, match="Work on a copy"):
            run(lambda net, x, change=change: net.hidden.register_hook(returning_nothing(change)))


@pytest.mark.parametrize("scale", [None, 2])
def test_hooks_of_nodes(scale):
    seen = []

    def before(grads):
        seen.append(grads[0].norm())
        return scale and (grads[0] * scale,)

    def after(grads, outputs):
        seen.append(grads[0].norm() + outputs[0].norm())
        return scale and (grads[0] * scale,)

    def watch(net, x):
        net.hidden.grad_fn.register_prehook(before)
        net.hidden.grad_fn.register_hook(after)

    compare(*run(watch))
    torch.testing.assert_close(seen[:2], seen[2:])


@pytest.mark.parametrize("scale", [None, 2])
@pytest.mark.parametrize("module", ["first", "second", "whole"])
def test_hooks_of_modules(module, scale):
    seen, types = [], []

    def see(module, *grads):
        seen.extend(grad for group in grads for grad in group)
        return scale and (grads[0][0] * scale,)

    def before(net, x):
        hooked = net if module == "whole" else getattr(net, module)
        hooked.register_full_backward_pre_hook(see)
        hooked.register_full_backward_hook(see)

    with strict():  # it goes on with the kept rows
        compare(*run(lambda net, x: net.hidden.register_hook(lambda grad: types.append(type(grad))), before=before))
    assert types[1] is (torch.Tensor if module == "whole" else RowSparseTensor)
    compare(seen[:3], seen[3:])


# ---- gradients of activations --------------------------------------------------------------------------------------


def retained(net, x, loss):
    net.hidden.retain_grad()
    loss.backward()
    return net.hidden.grad


def asked_for(net, x, loss):
    return torch.autograd.grad(loss, [net.hidden, x])[0]


@pytest.mark.parametrize("get", [retained, asked_for])
@pytest.mark.parametrize("name", HOOKS)
def test_gradient_of_an_activation(name, get):
    dense, sparse = run(backward=get)
    for grad in (dense, sparse):
        returned = HOOKS[name](grad)
        grad.copy_(grad if returned is None else returned)
    compare([dense], [densify(sparse)])


READS = {
    "numpy": lambda grad: grad.numpy(),
    "tolist": lambda grad: grad.tolist(),
    "pickle": lambda grad: pickle.loads(pickle.dumps(grad)),
    "deepcopy": copy.deepcopy,
    "dlpack": torch.from_dlpack,
    "storage": lambda grad: list(grad.untyped_storage()),
    "iteration": list,
    "entry": lambda grad: grad[1, 2, 3].item(),
    "compiled function": torch.compile(lambda grad: grad * 2 + 1, backend="eager"),
    "norm": lambda grad: torch.nn.utils.get_total_norm([grad], foreach=True),
}


@pytest.mark.parametrize("name", READS)
def test_reading_a_gradient(name):
    dense, sparse = run(backward=asked_for)
    torch.testing.assert_close(READS[name](sparse), READS[name](dense))
