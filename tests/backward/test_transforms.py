"""Derivatives of other kinds than a backward pass: they get ordinary tensors, and the right numbers."""

from functools import partial

import pytest
import torch
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual

from hf_trim.backward.eager.sparse import take_rows_sparse


KEPT = torch.tensor([1, 3])


def forward_over_reverse(f, weight, factors=(0, 0)):
    """The tangents of what `f` returns and of its gradient; with `factors`, the weight has none."""
    weight = weight.clone().requires_grad_()
    with dual_level():
        taken = f(weight if any(factors) else make_dual(weight, weight.detach()))
        if any(factors):
            taken = taken * make_dual(torch.ones(2), torch.tensor(factors))
        (grad,) = torch.autograd.grad(taken.sum(), weight)
        return torch.cat([unpack_dual(x).tangent.flatten() for x in (taken, grad)])


TRANSFORMS = {
    "grad": lambda f, weight: torch.func.grad(lambda w: f(w).sum())(weight),
    "vmap": lambda f, weight: torch.func.vmap(f)(torch.stack([weight, weight + 1])),
    "jacfwd": lambda f, weight: torch.func.jacfwd(f)(weight),
    "hessian": lambda f, weight: torch.func.hessian(lambda w: f(w).sum())(weight),
    "batched gradients": lambda f, weight: torch.autograd.functional.jacobian(f, weight, vectorize=True),
    "forward mode": forward_over_reverse,
    "forward mode behind the losses": partial(forward_over_reverse, factors=(2.0, 3.0)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name):
    torch.manual_seed(0)
    x, weight = torch.rand(5, 3), torch.rand(3, 3)

    def f(weight, take):
        return take((x @ weight).sin().square().sum(1))

    sparse = TRANSFORMS[name](partial(f, take=lambda losses: take_rows_sparse(losses, KEPT)), weight)
    torch.testing.assert_close(sparse, TRANSFORMS[name](partial(f, take=lambda losses: losses[KEPT]), weight))
