"""
Views that rules are written for by hand; those of the others follow from the facts. The same rules serve
gradients and activations: a view never depends on what the other rows hold.

e.g. `[B, T, C]` viewed as `[B·T, C]`, B = 4, T = 2, rows 1 and 3 kept: the payload `[2, T, C]` becomes `[2·2, C]`,
with rows along dimension 0 and `row_inner = 2`. Viewed as `[B, T·C]`, `row_inner` stays 1. As `[2, 2, T, C]` the rows
themselves would be split: the op runs dense.
"""

from math import prod

import torch

from hf_trim.backward.facts.fact import squeezed, squeezed_dims
from hf_trim.backward.registry import ACTIVATIONS, GRADIENTS, NotRowwiseError, implements, require


@implements("squeeze", "squeeze.dim", "squeeze.dims", table=(GRADIENTS, ACTIVATIONS))
def squeeze(func, x, dim=None):
    return x.like(x.payload.squeeze(squeezed_dims(x, dim)), squeezed(x, dim))


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


# ---- writes into a part of a tensor ------------------------------------------------------------------------------
# The node of `out[:, t] = x` copies its gradient to a tensor of the strides of `out`, and writes to the part of it
# that was overwritten.


@implements("new_empty_strided")
def new_empty_strided(func, x, size, stride, **kwargs):
    """The gradient's own rows, where they fit."""
    if list(size) != list(x.shape) or kwargs.get("dtype") not in (None, x.dtype):
        return func(torch.empty(0, dtype=x.dtype, device=x.device), size, stride, **kwargs)
    count, step = x.shape[x.row_dim], stride[x.row_dim]
    kept = x.payload.shape[x.row_dim]
    out = x.like(x.payload.new_empty_strided(x.payload.shape, [n * kept // count if n > step else n for n in stride]))
    require(out.stride() == tuple(stride), "the rows have other strides")
    return out


@implements("as_strided")
def as_strided(func, x, size, stride, offset=None):
    """The same entries of each row: the rows are one dimension of the view, and the others stay inside a row."""
    count, kept, step = x.shape[x.row_dim], x.payload.shape[x.row_dim], x.stride(x.row_dim)
    dims = [d for d, n in enumerate(size) if n == count and stride[d] == step]
    require(len(dims) == 1 and count > 1 and x.payload.stride(x.row_dim) == step, "it works along the rows")
    extent = 1 + sum((n - 1) * s for n, s in zip(x.payload.shape, x.payload.stride(), strict=True))
    require(extent == x.payload.numel(), "there are gaps in memory")
    before, start = divmod(offset or 0, count * step)
    size, stride = list(size), list(stride)
    end = start
    for d, n in enumerate(size):
        if d == dims[0]:
            size[d] = kept
        elif n > 1 and stride[d] >= count * step:
            require(stride[d] % (count * step) == 0, "it works along the rows")
            stride[d] = stride[d] // count * kept
        else:
            end += (n - 1) * stride[d]
    require(end < step, "it works along the rows")
    offset = x.payload.storage_offset() + before * kept * step + start
    return x.like(x.payload.as_strided(size, stride, offset), dims[0])
