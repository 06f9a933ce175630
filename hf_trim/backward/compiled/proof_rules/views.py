"""
Proof rules of views, and of ops that join tensors.

Example: a gradient `[s0, 5, 16]` (B, T, C) has its rows in dimension 0.

| op | result | rows |
|---|---|---|
| `view(grad, [s0*5, 16])` | `[s0*5, 16]` | dimension 0, inner 5 |
| `view` of `permute(grad, [1, 0, 2])` as `[5*s0, 16]` | `[5*s0, 16]` | dimension 0, outer 5 |
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import reduce

import sympy

from hf_trim.backward.compiled.proof_rules.derived import derived_rule
from hf_trim.backward.compiled.values import Zeros, check_same_dim, is_equal, is_integral
from hf_trim.backward.facts import FACTS
from hf_trim.backward.registry import PROOF, implements, require


@implements("view", "_unsafe_view", table=PROOF)
def _view(prop, name, shape, x, *args):
    """
    For example `[B*T, C]` as `[B, T, C]`: inner T becomes 1. `[B, H, T, T]` as `[B*H, T, T]`: inner 1 becomes H.
    """
    if x.row_dim is None:
        return prop.result(shape, zeros=x.zeros)
    dims = prop.row_dims(shape)
    require(len(dims) == 1, "its result has the batch size in two dimensions")
    dim = dims[0]
    if x.outer is None:
        if x.zeros == Zeros.EVERYWHERE:
            return prop.result(shape, dim, zeros=x.zeros)
        # It is equal all along the dimension, but need not be along what that is merged with now.
        x = replace(x, outer=sympy.Integer(1), inner=prop.merged_size(x.shape[x.row_dim]))
    # The number of elements in front of the rows is the same before and after.
    before, after = _product(x.shape[: x.row_dim]), _product(shape[:dim])
    outer = sympy.cancel(before * x.outer / after)
    inner = sympy.cancel(prop.merged_size(shape[dim]) / outer)
    if not is_integral(outer) or not is_integral(inner):
        split_off = sympy.cancel(after / before)
        prop.constrain(x, split_off, sympy.cancel(x.outer * x.inner / split_off), "a view splits the rows")
        outer, inner = sympy.Integer(1), prop.merged_size(shape[dim])
    is_row_index = x.is_row_index and outer == inner == 1
    if not (is_equal(outer, x.outer) and is_equal(inner, x.inner)):
        x = replace(x, outer=outer, inner=inner, origin=None)
    return prop.result(shape, dim, x, x.zeros, is_row_index)


def _product(sizes: Iterable) -> sympy.Expr:
    return reduce(lambda a, b: a * b, sizes, sympy.Integer(1))


@implements("expand", table=PROOF)
def _expand(prop, name, shape, x, *args, **kwargs):
    if x.row_dim is None:
        return prop.uniform_result(shape, x.zeros)
    return derived_rule(FACTS["expand"], is_view=True)(prop, name, shape, x, *args, **kwargs)


@implements("select_scatter", table=PROOF)
def _select_scatter(prop, name, shape, x, source, dim, index):
    dim %= x.ndim
    if source.row_dim is not None:
        source = replace(source, row_dim=source.row_dim + (source.row_dim >= dim), shape=shape)
    return derived_rule(FACTS["slice_scatter"])(prop, name, shape, x, source, dim, index, 0)


@implements("cat", "stack", table=PROOF)
def _cat(prop, name, shape, tensors, dim=0):
    dim %= len(shape)
    dims = {None if x.row_dim is None else x.row_dim + (name == "stack" and x.row_dim >= dim) for x in tensors}
    check_same_dim(dims)
    row_dim, zeros = dims.pop(), min(x.zeros for x in tensors)
    if name == "stack" or row_dim != dim or row_dim is None:
        return prop.result(shape, row_dim, prop.common_layout(tensors), zeros)
    # Two `[B, ...]` become `[2*B, ...]` with outer 2, as in the gradient of an `unbind`.
    require(all(x.outer is not None and is_equal(x.inner, tensors[0].inner) for x in tensors), "it joins rows to rows")
    joined = replace(tensors[0], outer=sum(x.outer for x in tensors), origin=None)
    return prop.result(shape, row_dim, joined, zeros)
