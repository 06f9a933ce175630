"""
Views. The same rules serve gradients and activations: a view never depends on what the other rows hold.

e.g. `[B, T, C]` viewed as `[B·T, C]`, B = 4, T = 2, rows 1 and 3 kept: the payload `[2, T, C]` becomes `[2·2, C]`,
with rows along dimension 0 and `row_inner = 2`. Viewed as `[B, T·C]`, `row_inner` stays 1. As `[2, 2, T, C]` the rows
themselves would be split: the op runs dense.
"""

from math import prod

import torch

from hf_trim.backward.eager.rows import NotRowwiseError
from hf_trim.backward.eager.rules.operands import require, require_other_dim
from hf_trim.backward.registry import ACTIVATIONS, GRADIENTS, implements


aten = torch.ops.aten


@implements("alias", "detach", table=(GRADIENTS, ACTIVATIONS))
def alias(func, x):
    return x.like(func(x.payload))


@implements("view_as_real", "view_as_complex", table=(GRADIENTS, ACTIVATIONS))
def view_as(func, x):
    require(func is aten.view_as_real.default or x.row_dim < x.ndim - 1, "rows are real and imaginary parts")
    return x.like(func(x.payload))


@implements("lift_fresh", table=(GRADIENTS, ACTIVATIONS))
def lift_fresh(func, x):
    return x


@implements("view", "_unsafe_view", "_reshape_alias", table=(GRADIENTS, ACTIVATIONS))
def view(func, x, size, stride=None):
    key = ("view", x.shape, x.row_dim, x.row_outer, x.row_inner, *size)
    plan = x.rows.plans.get(key)
    if plan is None:
        plan = x.rows.plans[key] = plan_view(x, list(size))
    size, *layout = plan
    return type(x)(x.payload.view(size), x.rows, *layout)


def plan_view(x, size: list[int]) -> tuple:
    """
    Finds the dimension of a view that the rows begin in.

    e.g. `[B, T, C]` → `[B·T, C]`: size B·T is a multiple of B, and T of what is behind the rows fits into it.

    Returns:
        `tuple`: The payload's size, and `row_dim`, `row_outer` and `row_inner` of the view.

    Raises:
        `NotRowwiseError`: If the view splits the rows themselves.
    """
    if -1 in size:
        size[size.index(-1)] = x.numel() // -prod(size)
    before, after = x.row_outer, x.row_inner  # what lies in front of the rows, and behind them, in memory order
    for n in x.shape[: x.row_dim]:
        before *= n
    for n in x.shape[x.row_dim + 1 :]:
        after *= n
    for dim, n in enumerate(size):
        if before and n >= before * x.rows.batch and n % (before * x.rows.batch) == 0:
            # The rows begin here. What is behind them may be split among this dimension and the following ones.
            inner = n // (before * x.rows.batch)
            if after % inner == 0:
                size[dim] = before * x.rows.count * inner
                return size, dim, before, inner
        if n == 0 or before % n:
            break
        before //= n
    raise NotRowwiseError(f"{size} splits the rows")


@implements("t", "transpose.int", table=(GRADIENTS, ACTIVATIONS))
def transpose(func, x, dim0=0, dim1=1):
    if x.ndim < 2:
        return alias(aten.alias.default, x)
    dim0, dim1 = dim0 % x.ndim, dim1 % x.ndim
    dim = {dim0: dim1, dim1: dim0}.get(x.row_dim, x.row_dim)
    return x.like(x.payload.transpose(dim0, dim1), dim)


@implements("permute", table=(GRADIENTS, ACTIVATIONS))
def permute(func, x, dims):
    dims = [d % x.ndim for d in dims]
    return x.like(x.payload.permute(dims), dims.index(x.row_dim))


@implements("expand", table=(GRADIENTS, ACTIVATIONS))
def expand(func, x, size, implicit=False):
    dim = x.row_dim + len(size) - x.ndim
    require(size[dim] in (-1, x.shape[x.row_dim]), "rows are repeated")  # B = 1 expanded to more
    size = [x.payload.shape[x.row_dim] if d == dim else n for d, n in enumerate(size)]
    return x.like(x.payload.expand(size), dim)


@implements("unsqueeze", table=(GRADIENTS, ACTIVATIONS))
def unsqueeze(func, x, dim):
    dim %= x.ndim + 1
    return x.like(x.payload.unsqueeze(dim), x.row_dim + (dim <= x.row_dim))


@implements("squeeze", "squeeze.dim", "squeeze.dims", table=(GRADIENTS, ACTIVATIONS))
def squeeze(func, x, dim=None):
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    # The rows' dimension stays: one kept row of several must not vanish.
    dims = [d % x.ndim for d in dims if x.shape[d] == 1 and d % x.ndim != x.row_dim]
    return x.like(x.payload.squeeze(dims), x.row_dim - sum(d < x.row_dim for d in dims))


@implements("select.int", table=(GRADIENTS, ACTIVATIONS))
def select(func, x, dim, index):
    dim = require_other_dim(x, dim)
    return x.like(x.payload.select(dim, index), x.row_dim - (dim < x.row_dim))


@implements("slice.Tensor", table=(GRADIENTS, ACTIVATIONS))
def slice_(func, x, dim=0, start=None, end=None, step=1):
    dim %= x.ndim
    if dim == x.row_dim:
        takes_all = (start is None or start == 0) and (end is None or end >= x.shape[dim]) and step == 1
        require(takes_all, "it works along the rows")
        return alias(aten.alias.default, x)
    return x.like(func(x.payload, dim, start, end, step))


@implements("split.Tensor", "split_with_sizes", table=(GRADIENTS, ACTIVATIONS))
@implements("unsafe_split.Tensor", "unsafe_split_with_sizes", table=(GRADIENTS, ACTIVATIONS))
def split(func, x, sizes, dim=0):
    dim = require_other_dim(x, dim)
    return [x.like(part) for part in func(x.payload, sizes, dim)]


@implements("unbind.int", table=(GRADIENTS, ACTIVATIONS))
def unbind(func, x, dim=0):
    dim = require_other_dim(x, dim)
    return [x.like(part, x.row_dim - (dim < x.row_dim)) for part in x.payload.unbind(dim)]


@implements("unfold", table=(GRADIENTS, ACTIVATIONS))
def unfold(func, x, dim, size, step):
    dim = require_other_dim(x, dim)
    return x.like(x.payload.unfold(dim, size, step))
