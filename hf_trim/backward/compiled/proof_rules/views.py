"""
Rules of the proof: where an op of a backward graph leaves the rows, and where its result is zero.

A rule gets the walk through the graph, the op's name, the symbolic shape of its result (or a list of shapes) and the
op's arguments, tensors as [`~hf_trim.backward.compiled.proof.Value`]. What it returns must hold for the op on the
whole batch and on any of its rows; else it raises [`~hf_trim.backward.compiled.proof.RowsMixedError`].
"""

from dataclasses import replace
from functools import reduce
from typing import Any

import sympy

from hf_trim.backward.compiled.proof import (
    EVERYWHERE,
    NOWHERE,
    RowsMixedError,
    Value,
    Walk,
    equal,
    expression,
    is_whole,
    pointwise,
    tensors,
    zero_of,
)
from hf_trim.backward.registry import PROOF, implements


def same(*values: Any) -> None:
    """Operands that must not carry rows."""
    if any(isinstance(value, Value) and value.dim is not None for value in values):
        raise RowsMixedError("an operand that serves all rows carries rows")


def is_batch_first(*values: Value) -> None:
    """Operands that must carry rows in their first dimension, not merged with anything."""
    for value in values:
        if value.dim != 0 or (value.outer is not None and not (value.outer == value.inner == 1)):
            raise RowsMixedError("rows are not samples")


def batch_first(walk: Walk, shape: tuple, zero: int = NOWHERE) -> Value:
    """A result that does so."""
    return replace(walk.result(shape, 0, zero=zero), outer=sympy.Integer(1), inner=sympy.Integer(1))


def batch_first_and_sums(walk: Walk, shapes: list, grad: Value) -> list:
    """What an op's backward returns: a gradient of rows, and others that are sums over them."""
    if not grad.zero:
        raise RowsMixedError("a sum over rows that are not all kept")
    return [
        batch_first(walk, shape, grad.zero) if at == 0 and shape else walk.result(shape, zero=grad.zero)
        for at, shape in enumerate(shapes)
    ]


# ---- tensors made of a number -------------------------------------------------------------------------------------


@implements("full", "full_like", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "new_full",
      "scalar_tensor", table=PROOF)  # fmt: skip
def _constant(walk, name, shape, *args, **kwargs):
    if "full" in name or name == "scalar_tensor":
        value = args[0 if name == "scalar_tensor" else 2 if name == "new_full" else 1]
        if isinstance(value, Value) or walk.counts_rows(value):
            raise RowsMixedError("the batch size is part of a value")
    else:
        value = "ones" in name
    return walk.uniform(shape, EVERYWHERE if value == 0 else NOWHERE)


@implements("iota", "arange", table=PROOF)
def _numbers(walk, name, shape, *args, start=None, step=None, **kwargs):
    if name == "arange":
        start, step = (args[0] if len(args) > 1 else 0), (args[2] if len(args) > 2 else 1)
    rows = walk.rows_in(shape)
    if not rows:
        if walk.counts_rows((args, start, step)):
            raise RowsMixedError("the batch size is part of a value")
        return walk.result(shape)
    if start != 0 or step != 1 or not equal(shape[0], walk.batch):
        raise RowsMixedError("numbers of rows that are not counted from 0")
    return replace(walk.result(shape, 0, numbers=True), outer=sympy.Integer(1), inner=sympy.Integer(1))


# ---- views --------------------------------------------------------------------------------------------------------


@implements("view", "_unsafe_view", "reshape", "unflatten", "flatten", table=PROOF)
def _view(walk, name, shape, x, *args):
    if x.dim is None:
        return walk.result(shape, zero=x.zero)
    rows = walk.rows_in(shape)
    if len(rows) != 1:
        raise RowsMixedError("rows meet rows")
    at = rows[0]
    if x.outer is None:
        if x.zero == EVERYWHERE:
            return walk.result(shape, at, zero=x.zero)
        x = replace(x, outer=sympy.Integer(1), inner=walk.merged(x.shape[x.dim]))  # of what is merged now, not all is
    before, now = _product(x.shape[: x.dim]), _product(shape[:at])
    outer = sympy.cancel(before * x.outer / now)
    inner = sympy.cancel(walk.merged(shape[at]) / outer)
    if not is_whole(outer) or not is_whole(inner):
        in_front = sympy.cancel(now / before)
        walk.wish(x, in_front, sympy.cancel(x.outer * x.inner / in_front), "a view splits the rows")
        outer, inner = sympy.Integer(1), walk.merged(shape[at])
    numbers = x.numbers and outer == inner == 1
    if not (equal(outer, x.outer) and equal(inner, x.inner)):
        x = replace(x, outer=outer, inner=inner, origin=None)
    return walk.result(shape, at, x, x.zero, numbers)


def _product(sizes) -> sympy.Expr:
    return reduce(lambda a, b: a * b, sizes, sympy.Integer(1))


def _moved(walk, shape, x, order) -> Value:
    """Dimension `order[d]` becomes dimension d."""
    return walk.result(shape, None if x.dim is None else order.index(x.dim), x, x.zero)


@implements("permute", table=PROOF)
def _permute(walk, name, shape, x, dims):
    return _moved(walk, shape, x, [d % len(shape) for d in dims])


@implements("t", table=PROOF)
def _t(walk, name, shape, x):
    return _moved(walk, shape, x, list(range(len(shape)))[::-1])


@implements("transpose", table=PROOF)
def _transpose(walk, name, shape, x, a, b):
    order = list(range(len(shape)))
    order[a], order[b] = order[b], order[a]
    return _moved(walk, shape, x, order)


@implements("unsqueeze", table=PROOF)
def _unsqueeze(walk, name, shape, x, dim):
    dim %= len(shape)
    at = None if x.dim is None else x.dim + (x.dim >= dim)
    return replace(walk.result(shape, at, x, x.zero, x.numbers), source=x.source)


@implements("squeeze", table=PROOF)
def _squeeze(walk, name, shape, x, dims=None):
    if dims is None:
        dims = [d for d, size in enumerate(x.shape) if size == 1]
    dims = {d % len(x.shape) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    dims = {d for d in dims if x.shape[d] == 1}
    at = None if x.dim is None else x.dim - sum(d < x.dim for d in dims)
    return walk.result(shape, at, x, x.zero, x.numbers)


@implements("view_as_real", "view_as_complex", table=PROOF)
def _complex(walk, name, shape, x):
    if name == "view_as_complex" and x.dim == len(shape):
        raise RowsMixedError("rows are real and imaginary parts")
    return walk.result(shape, x.dim, x, x.zero)


@implements("expand", table=PROOF)
def _expand(walk, name, shape, x, sizes, **kwargs):
    if x.dim is not None:
        return walk.result(shape, x.dim + len(shape) - len(x.shape), x, x.zero, x.numbers)
    return walk.uniform(shape, x.zero)


@implements("repeat", table=PROOF)
def _repeat(walk, name, shape, x, repeats):
    added = len(shape) - len(x.shape)
    if x.dim is None or repeats[x.dim + added] != 1 or walk.counts_rows(repeats):
        raise RowsMixedError("rows are repeated")
    return walk.result(shape, x.dim + added, x, x.zero)


def _is_whole_slice(x, dim, start, end, step) -> bool:
    size = x.shape[dim]
    ends = end is None or (isinstance(end, int) and end >= 2**62) or equal(expression(end), size)
    return start in (None, 0) and ends and step == 1


@implements("slice", table=PROOF)
def _slice(walk, name, shape, x, dim=0, start=None, end=None, step=1):
    dim %= len(shape)
    if _is_whole_slice(x, dim, start, end, step):
        return x
    if dim == x.dim:
        raise RowsMixedError("a part of the rows is taken")
    elif walk.counts_rows((start, end, step)):
        raise RowsMixedError("the batch size is part of a value")
    return walk.result(shape, x.dim, x, x.zero, x.numbers)


@implements("select", table=PROOF)
def _select(walk, name, shape, x, dim, index):
    dim %= len(x.shape)
    if dim == x.dim or walk.counts_rows(index):
        raise RowsMixedError("one row is taken")
    at = None if x.dim is None else x.dim - (x.dim > dim)
    return walk.result(shape, at, x, x.zero, x.numbers)


@implements("select_backward", table=PROOF)
def _select_backward(walk, name, shape, grad, sizes, dim, index):
    dim %= len(shape)
    at = None if grad.dim is None else grad.dim + (grad.dim >= dim)
    if walk.counts_rows(index):
        raise RowsMixedError("the batch size is part of a value")
    return walk.result(shape, at, grad, grad.zero)


@implements("slice_backward", table=PROOF)
def _slice_backward(walk, name, shape, grad, sizes, dim, start, end, step):
    if grad.dim == dim % len(shape):
        if not (_is_whole_slice(grad, grad.dim, start, end, step) and equal(grad.shape[grad.dim], shape[grad.dim])):
            raise RowsMixedError("a part of the rows is taken")
    elif walk.counts_rows((start, end, step)):
        raise RowsMixedError("the batch size is part of a value")
    return walk.result(shape, grad.dim, grad, grad.zero)


@implements("select_scatter", "slice_scatter", table=PROOF)
def _scatter_into(walk, name, shape, x, source, dim=0, *place, **kwargs):
    dim %= len(shape)
    if walk.counts_rows((place, kwargs)) and x.dim != dim:
        raise RowsMixedError("the batch size is part of a value")
    at = source.dim
    if at is not None and name == "select_scatter":
        at += at >= dim
    if x.dim != at:
        raise RowsMixedError("rows meet rows")
    if at == dim:
        start, end, step = (*place, *(None, None, 1)[len(place) :])
        whole = _is_whole_slice(x, dim, kwargs.get("start", start), kwargs.get("end", end), kwargs.get("step", step))
        if name == "select_scatter" or not whole:
            raise RowsMixedError("a part of the rows is taken")
    return walk.result(shape, at, walk.layout([x, source]), min(x.zero, source.zero))


@implements("cat", "stack", table=PROOF)
def _cat(walk, name, shape, tensors, dim=0):
    dim %= len(shape)
    dims = {None if x.dim is None else x.dim + (name == "stack" and x.dim >= dim) for x in tensors}
    if len(dims) > 1:
        raise RowsMixedError("rows meet rows")
    at, zero = dims.pop(), min(x.zero for x in tensors)
    if name == "stack" or at != dim or at is None:
        return walk.result(shape, at, walk.layout(tensors), zero)
    # [B, ...] after [B, ...], as in the gradient of an `unbind`
    if any(x.outer is None or not equal(x.inner, tensors[0].inner) for x in tensors):
        raise RowsMixedError("rows are joined to rows")
    return walk.result(shape, at, replace(tensors[0], outer=sum(x.outer for x in tensors), origin=None), zero)


@implements("split", "split_with_sizes", "unbind", "chunk", table=PROOF)
def _split(walk, name, shapes, x, *args, **kwargs):
    dim = kwargs.get("dim", args[-1] if len(args) == (1 if name == "unbind" else 2) else 0) % len(x.shape)
    if dim == x.dim:
        raise RowsMixedError("the rows are split")
    at = x.dim if x.dim is None or name != "unbind" else x.dim - (x.dim > dim)
    return [walk.result(shape, at, x, x.zero) for shape in shapes]


@implements("constant_pad_nd", table=PROOF)
def _pad(walk, name, shape, x, pad, value=0):
    if x.dim is not None:
        behind = len(x.shape) - 1 - x.dim
        if any(each != 0 for each in pad[2 * behind : 2 * behind + 2]) or walk.counts_rows(pad):
            raise RowsMixedError("rows are added")
    return walk.result(shape, x.dim, x, x.zero if value == 0 else NOWHERE)


@implements("flip", "rev", "roll", table=PROOF)
def _turn(walk, name, shape, x, *args):
    dims = args[-1] if name != "roll" or len(args) > 1 else []
    dims = {d % len(shape) for d in dims}
    if not dims or x.dim in dims:
        raise RowsMixedError("rows change places")
    return walk.result(shape, x.dim, x, x.zero)


# ---- reductions ---------------------------------------------------------------------------------------------------


def _dims(x: Value, dims: Any) -> set[int]:
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return set(range(len(x.shape)))
    return {d % len(x.shape) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}


def _reduced(walk, shape, x, dims, zero) -> Value:
    """Rows of a reduction over other dimensions."""
    if x.dim in dims:
        raise RowsMixedError("a value of all rows together")
    if x.dim is None:
        return walk.result(shape, zero=zero)
    kept = len(shape) == len(x.shape)
    return walk.result(shape, x.dim if kept else x.dim - sum(d < x.dim for d in dims), x, zero)


@implements("sum", table=PROOF)
def _sum(walk, name, shape, x, dims=None, *args, **kwargs):
    dims = _dims(x, dims)
    if x.dim not in dims or x.dim is None:
        return _reduced(walk, shape, x, dims, x.zero)
    if x.zero == NOWHERE:
        raise RowsMixedError("a sum over rows that are not all kept")
    # What is merged with the rows is summed, too, and what is the same of it is zero where all is.
    return walk.result(shape, zero=x.zero)


@implements("mean", "prod", "amax", "amin", "any", "all", "logsumexp", "argmax", "argmin", table=PROOF)
def _reduction(walk, name, shape, x, dims=None, *args, **kwargs):
    zero = x.zero if name in ("mean", "amax", "amin", "any") else NOWHERE
    return _reduced(walk, shape, x, _dims(x, dims), zero)


@implements("var_mean", "var", "std", "std_mean", table=PROOF)
def _variance(walk, name, shapes, x, dims=None, *args, **kwargs):
    several = isinstance(shapes, list)
    found = [_reduced(walk, shape, x, _dims(x, dims), NOWHERE) for shape in (shapes if several else [shapes])]
    return found if several else found[0]


@implements("_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", table=PROOF)
def _along(walk, name, shape, x, dim, *args, **kwargs):
    if x.dim == dim % len(shape):
        raise RowsMixedError("a value of all rows together")
    return walk.result(shape, x.dim, x, x.zero if name == "cumsum" else NOWHERE)


@implements("sort", "topk", "max", "min", "cummax", "cummin", table=PROOF)
def _along_with_indices(walk, name, shapes, x, *args, **kwargs):
    if not isinstance(shapes, list):
        raise RowsMixedError("a value of all rows together")
    dims = {"sort": 0, "topk": 1}
    at = dims.get(name, 0)
    dim = kwargs.get("dim", args[at] if len(args) > at else -1)
    return [_reduced(walk, shape, x, {dim % len(x.shape)}, NOWHERE) for shape in shapes]


@implements("_softmax_backward_data", "_log_softmax_backward_data", table=PROOF)
def _softmax_backward(walk, name, shape, grad, out, dim, dtype):
    if dim % len(shape) in (grad.dim, out.dim):
        raise RowsMixedError("a value of all rows together")
    return pointwise(walk, "mul", shape, grad, out) if grad.zero else pointwise(walk, "softmax", shape, grad, out)


# ---- products -----------------------------------------------------------------------------------------------------


def _product_of(walk, shape, a: Value, b: Value) -> Value:
    """`[..., M, K] @ [..., K, N]`"""
    last, zero = len(shape) - 1, max(a.zero, b.zero)
    if a.dim is None and b.dim is None:
        return walk.result(shape, zero=zero)
    layout = walk.layout([a, b])
    if a.dim == last and b.dim == last - 1:
        if zero == NOWHERE:
            raise RowsMixedError("a sum over rows that are not all kept")
        return walk.result(shape, zero=zero)
    batched = last > 1 and a.dim == b.dim == 0
    if batched or (b.dim is None and a.dim == last - 1):
        return walk.result(shape, a.dim, layout, zero)
    if a.dim is None and b.dim == last:
        return walk.result(shape, b.dim, layout, zero)
    raise RowsMixedError("rows meet rows")


@implements("mm", "bmm", table=PROOF)
def _mm(walk, name, shape, a, b, *args, **kwargs):
    return _product_of(walk, shape, a, b)


@implements("addmm", "baddbmm", table=PROOF)
def _addmm(walk, name, shape, bias, a, b, *, beta=1, alpha=1):
    return pointwise(walk, "add", shape, bias, _product_of(walk, shape, a, b))


# ---- attention, convolution, norms, losses, pooling ----------------------------------------------------------------


def _first_rows(walk, name, shape, zero) -> Value:
    """An output with rows in front; others, such as a kernel's random state, must go unused."""
    if walk.rows_in(shape) != [0]:
        return Value(shape, unknown=f"{name}: an output without rows")
    return batch_first(walk, shape, zero)


@implements(
    "_scaled_dot_product_flash_attention_for_cpu_backward", "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_efficient_attention_backward", "_scaled_dot_product_cudnn_attention_backward",
    table=PROOF,
)  # fmt: skip
def _attention_backward(walk, name, shapes, grad, query, key, value, *args, **kwargs):
    # Each has one float among its arguments by position, and kernels draw their masks by the position in the batch.
    if next(x for x in args if isinstance(x, float)) != 0:
        raise RowsMixedError("dropout inside of the attention kernel")
    carriers = [x for x in tensors((grad, query, key, value, args, kwargs)) if x.dim is not None]
    is_batch_first(grad, query, key, value, *carriers)
    asked = next((x for x in args if isinstance(x, (list, tuple))), None)  # which of the gradients are asked for
    if asked is not None and len(asked) > 3 and asked[3]:
        raise RowsMixedError("the bias wants a gradient")
    return [
        walk.result(shape, 0, grad, grad.zero)
        if walk.rows_in(shape) == [0]
        else Value(shape, unknown=f"{name}: output")
        for shape in shapes
    ]


@implements("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
      "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention", table=PROOF)  # fmt: skip
def _attention(walk, name, shapes, query, key, value, *args, **kwargs):
    dropout = [x for x in (*args, kwargs.get("dropout_p", 0.0)) if isinstance(x, float)]
    if any(dropout):
        raise RowsMixedError("dropout inside of the attention kernel")
    is_batch_first(query, key, value, *(x for x in tensors((args, kwargs)) if x.dim is not None))
    return [_first_rows(walk, name, shape, NOWHERE) for shape in shapes]


@implements("convolution", table=PROOF)
def _convolution(walk, name, shape, x, weight, bias, *args):
    same(weight, bias)
    is_batch_first(x)
    return batch_first(walk, shape)


@implements("convolution_backward", table=PROOF)
def _convolution_backward(walk, name, shapes, grad, x, weight, bias_sizes, *args):
    same(weight)
    is_batch_first(grad, x)
    return batch_first_and_sums(walk, shapes, grad)


@implements("native_layer_norm_backward", "_fused_rms_norm_backward", table=PROOF)
def _norm_backward(walk, name, shapes, grad, x, normalized, *others):
    first = len(grad.shape) - len(normalized)
    carriers = [each for each in (grad, x, *tensors(others)) if each.dim is not None]
    if any(each.dim >= first or each.dim != grad.dim for each in carriers):
        raise RowsMixedError("rows are normalized")
    if not grad.zero:
        raise RowsMixedError("a sum over rows that are not all kept")
    return [
        walk.result(shape, grad.dim if at == 0 and shape else None, walk.layout(carriers), grad.zero)
        for at, shape in enumerate(shapes)
    ]


@implements("native_layer_norm", "_fused_rms_norm", table=PROOF)
def _norm(walk, name, shapes, x, normalized, *others):
    same(*others)
    if x.dim is not None and x.dim >= len(x.shape) - len(normalized):
        raise RowsMixedError("rows are normalized")
    return [walk.result(shape, x.dim, x) for shape in shapes]


@implements("native_group_norm_backward", table=PROOF)
def _group_norm_backward(walk, name, shapes, grad, x, mean, rstd, weight, *sizes):
    same(weight)
    is_batch_first(grad, x, mean, rstd)
    return batch_first_and_sums(walk, shapes, grad)


@implements("native_group_norm", table=PROOF)
def _group_norm(walk, name, shapes, x, weight, bias, *sizes):
    same(weight, bias)
    is_batch_first(x)
    return [batch_first(walk, shape) for shape in shapes]


@implements("native_batch_norm_backward", table=PROOF)
def _batch_norm_backward(walk, name, shapes, grad, x, weight, mean, variance, saved_mean, saved_rstd, train, *others):
    if train:
        raise RowsMixedError("batch norm in training mode mixes rows")
    same(weight, mean, variance, saved_mean, saved_rstd)
    is_batch_first(grad, x)
    return batch_first_and_sums(walk, shapes, grad)


@implements("nll_loss_backward", "nll_loss2d_backward", "mse_loss_backward", "smooth_l1_loss_backward",
      "huber_loss_backward", "binary_cross_entropy_backward", table=PROOF)  # fmt: skip
def _loss_backward(walk, name, shape, grad, x, target, *others):
    if grad.zero == EVERYWHERE:  # a loss that no gradient comes from
        return pointwise(walk, "mul", shape, grad, x)
    reduction = next(each for each in others if isinstance(each, int))
    if reduction != 0:
        raise RowsMixedError("a value of all rows together")
    is_batch_first(grad, x, target)
    same(*others)
    return batch_first(walk, shape, grad.zero)


@implements("max_pool2d_with_indices_backward", "avg_pool2d_backward", "_adaptive_avg_pool2d_backward",
      "adaptive_max_pool2d_backward", table=PROOF)  # fmt: skip
def _pool_backward(walk, name, shape, grad, x, *args):
    is_batch_first(grad, x, *tensors(args))
    return batch_first(walk, shape, grad.zero)


@implements("_low_memory_max_pool_offsets_to_indices", table=PROOF)
def _pool_indices(walk, name, shape, offsets, *args):
    is_batch_first(offsets)
    return batch_first(walk, shape)


# ---- indexing -----------------------------------------------------------------------------------------------------


@implements("gather", table=PROOF)
def _gather(walk, name, shape, x, dim, index, **kwargs):
    if x.dim is None or x.dim == dim % len(shape) or index.dim != x.dim or not equal(x.shape[x.dim], shape[x.dim]):
        raise RowsMixedError("rows are looked up")
    return walk.result(shape, x.dim, walk.layout([x, index]), x.zero)


@implements("scatter", "scatter_add", table=PROOF)
def _scatter(walk, name, shape, x, dim, index, source, **kwargs):
    carriers = [x, index] + ([source] if isinstance(source, Value) else [])
    if any(each.dim is None or each.dim != x.dim for each in carriers) or x.dim == dim % len(shape):
        raise RowsMixedError("rows are looked up")
    if any(not equal(each.shape[x.dim], shape[x.dim]) for each in carriers):
        raise RowsMixedError("a part of the rows is looked up")
    return walk.result(shape, x.dim, walk.layout(carriers), min(x.zero, zero_of(source)))


@implements("embedding", table=PROOF)
def _embedding(walk, name, shape, weight, index, *args):
    same(weight)
    return walk.result(shape, index.dim, index)


@implements("embedding_dense_backward", table=PROOF)
def _embedding_backward(walk, name, shape, grad, index, size, padding, by_frequency):
    if by_frequency:
        raise RowsMixedError("frequencies are counted over the batch")
    if grad.dim is None or grad.dim != index.dim or not grad.zero:
        raise RowsMixedError("a sum over rows that are not all kept")
    walk.layout([grad, index])
    return walk.result(shape, zero=grad.zero)


def _indexed(walk, x: Value, indices) -> tuple[Value | None, bool]:
    """
    What `x[indices]` and its backward op look up: an index that carries rows (or `None`), aligned at the end of all
    indices' common shape, and whether it does so row by row in an `x` that carries rows.
    """
    given = {d: index for d, index in enumerate(indices) if index is not None}
    carriers = [index for index in given.values() if index.dim is not None]
    if len({index.dim - len(index.shape) for index in carriers}) > 1:
        raise RowsMixedError("rows meet rows")
    carrier = walk.layout(carriers) or (carriers[0] if carriers else None)
    if x.numbers or any(index.numbers for d, index in given.items() if d != x.dim):
        raise RowsMixedError("the number of a row is part of a value")
    if x.dim is None:
        return carrier, False
    if x.dim not in given:
        raise RowsMixedError("rows are looked up") if carriers else RowsMixedError("an index beside the rows")
    at = given[x.dim]
    source = None if at.source is None else at.source.meta["val"]
    if not at.numbers and source is not None and source.ndim == 1 and at.outer == at.inner == 1:
        walk.taken.add(at.source)
        walk.numbers.add(at.source)  # whether it does is looked at when it is there
    elif not at.numbers:
        raise RowsMixedError("rows are looked up")
    if not (x.outer is None or x.outer == x.inner == 1):
        raise RowsMixedError("rows are looked up in a merged dimension")
    return carrier, True


def _place_of_indices(indices) -> tuple[int, int]:
    """Where the indices' common shape is in `x[indices]`, and its number of dimensions."""
    at = [d for d, index in enumerate(indices) if index is not None]
    common = max(len(index.shape) for index in indices if index is not None)
    return (at[0] if at == list(range(at[0], at[-1] + 1)) else 0), common


@implements("index", "_unsafe_index", table=PROOF)
def _index(walk, name, shape, x, indices):
    others = [d for d in range(len(x.shape)) if d >= len(indices) or indices[d] is None]
    first, common = _place_of_indices(indices)
    if x.dim in others and not any(index is not None and index.dim is not None for index in indices):
        in_front = sum(d < x.dim for d in others)  # the same places of each row
        at = in_front if in_front < first else in_front + common
        return walk.result(shape, at, x, x.zero)
    carrier, by_row = _indexed(walk, x, indices)
    if carrier is None:
        return walk.result(shape, zero=x.zero)
    at = first + common + carrier.dim - len(carrier.shape)
    return walk.result(shape, at, carrier, x.zero if by_row or x.zero == EVERYWHERE else NOWHERE)


@implements("index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate", table=PROOF)
def _index_put(walk, name, shape, x, *args):
    mask = args[0] if "masked" in name else None
    indices, values, *accumulate = args[1:] if "masked" in name else args
    adds = "accumulate" in name or bool(accumulate and accumulate[0])
    others = [d for d in range(len(x.shape)) if d >= len(indices) or indices[d] is None]
    first, common = _place_of_indices(indices)
    if values.numbers:
        raise RowsMixedError("the number of a row is part of a value")
    if x.dim in others and not any(index is not None and index.dim is not None for index in indices):
        in_front = sum(d < x.dim for d in others)
        at = (in_front if in_front < first else in_front + common) - len(others) - common
        if values.dim is None or values.dim - len(values.shape) != at or mask is not None:
            raise RowsMixedError("rows meet rows")
        return walk.result(shape, x.dim, walk.layout([x, values]), min(x.zero, values.zero))
    carrier, by_row = _indexed(walk, x, indices)
    if carrier is None:
        same(values, mask)
        return walk.result(shape, zero=min(x.zero, values.zero))
    at = first + common + carrier.dim - len(carrier.shape) - len(others) - common
    carriers = [each for each in (values, mask) if each is not None and each.dim is not None]
    if any(each.dim - len(each.shape) != at for each in carriers):
        raise RowsMixedError("rows meet rows")
    layout = walk.layout([carrier, *carriers])
    if by_row:
        return walk.result(shape, x.dim, replace(x, outer=layout.outer, inner=layout.inner), min(x.zero, values.zero))
    if not adds or values.zero == NOWHERE:
        raise RowsMixedError("a sum over rows that are not all kept")
    return walk.result(shape, zero=min(x.zero, values.zero))
