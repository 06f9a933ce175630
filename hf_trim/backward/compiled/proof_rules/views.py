"""
Proof rules of views and other ops that move, join or cut dimensions.

Example: a gradient `[s0, 5, 16]` (B, T, C) has its rows in dimension 0.

| op | result | rows |
|---|---|---|
| `view(grad, [s0*5, 16])` | `[s0*5, 16]` | dimension 0, inner 5 |
| `permute(grad, [1, 0, 2])` | `[5, s0, 16]` | dimension 1 |
| `view` of that as `[5*s0, 16]` | `[5*s0, 16]` | dimension 0, outer 5 |
| `select(grad, 0, 1)` | `[5, 16]` | refused: one row |
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import reduce

import sympy

from hf_trim.backward._torch_internals import size_expression
from hf_trim.backward.compiled.errors import RowsMixedError
from hf_trim.backward.compiled.values import Value, Zeros, is_equal, is_integral
from hf_trim.backward.registry import PROOF, implements


@implements("view", "_unsafe_view", table=PROOF)
def _view(prop, name, shape, x, *args):
    """
    For example `[B*T, C]` as `[B, T, C]`: inner T becomes 1. `[B, H, T, T]` as `[B*H, T, T]`: inner 1 becomes H.
    """
    if x.dim is None:
        return prop.result(shape, zeros=x.zeros)
    dims = prop.row_dims(shape)
    if len(dims) != 1:
        raise RowsMixedError("its result has the batch size in two dimensions")
    dim = dims[0]
    if x.outer is None:
        if x.zeros == Zeros.EVERYWHERE:
            return prop.result(shape, dim, zeros=x.zeros)
        # It is equal all along the dimension, but need not be along what that is merged with now.
        x = replace(x, outer=sympy.Integer(1), inner=prop.merged_size(x.shape[x.dim]))
    # The number of elements in front of the rows is the same before and after.
    before, after = _product(x.shape[: x.dim]), _product(shape[:dim])
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


def _moved(prop, shape, x, order) -> Value:
    """Dimension `order[d]` becomes dimension d."""
    return prop.result(shape, None if x.dim is None else order.index(x.dim), x, x.zeros)


@implements("permute", table=PROOF)
def _permute(prop, name, shape, x, dims):
    return _moved(prop, shape, x, [d % len(shape) for d in dims])


@implements("t", table=PROOF)
def _t(prop, name, shape, x):
    return _moved(prop, shape, x, list(range(len(shape)))[::-1])


@implements("transpose", table=PROOF)
def _transpose(prop, name, shape, x, a, b):
    order = list(range(len(shape)))
    order[a], order[b] = order[b], order[a]
    return _moved(prop, shape, x, order)


@implements("unsqueeze", table=PROOF)
def _unsqueeze(prop, name, shape, x, dim):
    dim %= len(shape)
    row_dim = None if x.dim is None else x.dim + (x.dim >= dim)
    return replace(prop.result(shape, row_dim, x, x.zeros, x.is_row_index), source=x.source)


@implements("squeeze", table=PROOF)
def _squeeze(prop, name, shape, x, dims=None):
    if dims is None:
        dims = [d for d, size in enumerate(x.shape) if size == 1]
    dims = {d % len(x.shape) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    dims = {d for d in dims if x.shape[d] == 1}
    row_dim = None if x.dim is None else x.dim - sum(d < x.dim for d in dims)
    return prop.result(shape, row_dim, x, x.zeros, x.is_row_index)


@implements("view_as_real", "view_as_complex", table=PROOF)
def _complex(prop, name, shape, x):
    if name == "view_as_complex" and x.dim == len(shape):
        raise RowsMixedError("the rows become real and imaginary parts")
    return prop.result(shape, x.dim, x, x.zeros)


@implements("expand", table=PROOF)
def _expand(prop, name, shape, x, sizes, **kwargs):
    if x.dim is not None:
        return prop.result(shape, x.dim + len(shape) - len(x.shape), x, x.zeros, x.is_row_index)
    return prop.uniform_result(shape, x.zeros)


@implements("repeat", table=PROOF)
def _repeat(prop, name, shape, x, repeats):
    prop.check_no_batch_size(repeats)
    added = len(shape) - len(x.shape)
    if x.dim is None or repeats[x.dim + added] != 1:
        raise RowsMixedError("it repeats rows")
    return prop.result(shape, x.dim + added, x, x.zeros)


def _is_full_slice(x, dim, start, end, step) -> bool:
    size = x.shape[dim]
    # `x[1:]` has the largest integer for its end.
    has_end = end is None or (isinstance(end, int) and end >= 2**62) or is_equal(size_expression(end), size)
    return start in (None, 0) and has_end and step == 1


@implements("slice", table=PROOF)
def _slice(prop, name, shape, x, dim=0, start=None, end=None, step=1):
    dim %= len(shape)
    if _is_full_slice(x, dim, start, end, step):
        return x
    if dim == x.dim:
        raise RowsMixedError("it takes a part of the rows")
    prop.check_no_batch_size(start, end, step)
    return prop.result(shape, x.dim, x, x.zeros, x.is_row_index)


@implements("select", table=PROOF)
def _select(prop, name, shape, x, dim, index):
    dim %= len(x.shape)
    if dim == x.dim:
        raise RowsMixedError("it takes a part of the rows")
    prop.check_no_batch_size(index)
    row_dim = None if x.dim is None else x.dim - (x.dim > dim)
    return prop.result(shape, row_dim, x, x.zeros, x.is_row_index)


@implements("select_backward", table=PROOF)
def _select_backward(prop, name, shape, grad, sizes, dim, index):
    dim %= len(shape)
    row_dim = None if grad.dim is None else grad.dim + (grad.dim >= dim)
    prop.check_no_batch_size(index)
    return prop.result(shape, row_dim, grad, grad.zeros)


@implements("slice_backward", table=PROOF)
def _slice_backward(prop, name, shape, grad, sizes, dim, start, end, step):
    if grad.dim == dim % len(shape):
        if not (_is_full_slice(grad, grad.dim, start, end, step) and is_equal(grad.shape[grad.dim], shape[grad.dim])):
            raise RowsMixedError("it takes a part of the rows")
    else:
        prop.check_no_batch_size(start, end, step)
    return prop.result(shape, grad.dim, grad, grad.zeros)


@implements("select_scatter", "slice_scatter", table=PROOF)
def _scatter_into(prop, name, shape, x, source, dim=0, *place, **kwargs):
    dim %= len(shape)
    if x.dim != dim:
        prop.check_no_batch_size(place, kwargs)
    row_dim = source.dim
    if row_dim is not None and name == "select_scatter":
        row_dim += row_dim >= dim
    if x.dim != row_dim:
        raise RowsMixedError("its operands carry rows in different dimensions")
    if row_dim == dim:
        start, end, step = place + (None, None, 1)[len(place) :]
        is_full = _is_full_slice(x, dim, kwargs.get("start", start), kwargs.get("end", end), kwargs.get("step", step))
        if name == "select_scatter" or not is_full:
            raise RowsMixedError("it writes to a part of the rows")
    return prop.result(shape, row_dim, prop.common_layout([x, source]), min(x.zeros, source.zeros))


@implements("cat", "stack", table=PROOF)
def _cat(prop, name, shape, tensors, dim=0):
    dim %= len(shape)
    dims = {None if x.dim is None else x.dim + (name == "stack" and x.dim >= dim) for x in tensors}
    if len(dims) > 1:
        raise RowsMixedError("its operands carry rows in different dimensions")
    row_dim, zeros = dims.pop(), min(x.zeros for x in tensors)
    if name == "stack" or row_dim != dim or row_dim is None:
        return prop.result(shape, row_dim, prop.common_layout(tensors), zeros)
    # Two `[B, ...]` become `[2*B, ...]` with outer 2, as in the gradient of an `unbind`.
    if any(x.outer is None or not is_equal(x.inner, tensors[0].inner) for x in tensors):
        raise RowsMixedError("it joins rows to rows")
    joined = replace(tensors[0], outer=sum(x.outer for x in tensors), origin=None)
    return prop.result(shape, row_dim, joined, zeros)


@implements("split", "split_with_sizes", "unbind", table=PROOF)
def _split(prop, name, shapes, x, *args, **kwargs):
    dim = kwargs.get("dim", args[-1] if len(args) == (1 if name == "unbind" else 2) else 0) % len(x.shape)
    if dim == x.dim:
        raise RowsMixedError("it splits the rows")
    row_dim = x.dim if x.dim is None or name != "unbind" else x.dim - (x.dim > dim)
    return [prop.result(shape, row_dim, x, x.zeros) for shape in shapes]


@implements("constant_pad_nd", table=PROOF)
def _pad(prop, name, shape, x, pad, value=0):
    if x.dim is not None:
        # `pad` has two sizes for each dimension, the last dimension first.
        behind = len(x.shape) - 1 - x.dim
        prop.check_no_batch_size(pad)
        if any(size != 0 for size in pad[2 * behind : 2 * behind + 2]):
            raise RowsMixedError("it adds rows")
    return prop.result(shape, x.dim, x, x.zeros if value == 0 else Zeros.UNKNOWN)


@implements("flip", "rev", "roll", table=PROOF)
def _reorder(prop, name, shape, x, *args):
    dims = args[-1] if name != "roll" or len(args) > 1 else []
    dims = {d % len(shape) for d in dims}
    if not dims or x.dim in dims:
        raise RowsMixedError("it changes the order of the rows")
    return prop.result(shape, x.dim, x, x.zeros)
