"""
Proof rules of reductions, and of other ops that compute along a dimension.

Example: a gradient `[s0, 5, 16]` (B, T, C), zero outside of the kept rows, has its rows in dimension 0.

| op | result | rows |
|---|---|---|
| `sum(grad, [1])` | `[s0, 16]` | dimension 0 |
| `sum(grad, [0, 1])` | `[16]` | none: the rows that are left out are zero, the sum is the same |
| `mean(grad, [0])` | `[5, 16]` | refused: the mean of 2 kept rows of 4 is another one |
"""

from typing import Any

from hf_trim.backward.compiled.errors import RowsMixedError
from hf_trim.backward.compiled.proof_rules.pointwise import pointwise
from hf_trim.backward.compiled.values import Value, Zeros, check_sum_over_rows
from hf_trim.backward.registry import PROOF, implements


def _dims(x: Value, dims: Any) -> set[int]:
    """The dimensions over which an op reduces: all of them for `None` and `[]`."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return set(range(len(x.shape)))
    return {d % len(x.shape) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}


def _reduce(prop, shape, x, dims, zeros) -> Value:
    """The result of a reduction over dimensions that carry no rows."""
    if x.dim in dims:
        raise RowsMixedError("it computes a value from all rows together")
    if x.dim is None:
        return prop.result(shape, zeros=zeros)
    removed = 0 if len(shape) == len(x.shape) else sum(d < x.dim for d in dims)
    return prop.result(shape, x.dim - removed, x, zeros)


@implements("sum", table=PROOF)
def _sum(prop, name, shape, x, dims=None, *args, **kwargs):
    dims = _dims(x, dims)
    if x.dim not in dims or x.dim is None:
        return _reduce(prop, shape, x, dims, x.zeros)
    check_sum_over_rows(x.zeros)  # what is merged with the rows is summed too
    return prop.result(shape, zeros=x.zeros)


@implements("mean", "prod", "amax", "amin", "any", "all", "logsumexp", "argmax", "argmin", table=PROOF)
def _reduction(prop, name, shape, x, dims=None, *args, **kwargs):
    zeros = x.zeros if name in ("mean", "amax", "amin", "any") else Zeros.UNKNOWN
    return _reduce(prop, shape, x, _dims(x, dims), zeros)


@implements("var_mean", "var", "std", "std_mean", table=PROOF)
def _variance(prop, name, shapes, x, dims=None, *args, **kwargs):
    dims = _dims(x, dims)
    if isinstance(shapes, list):
        return [_reduce(prop, shape, x, dims, Zeros.UNKNOWN) for shape in shapes]
    return _reduce(prop, shapes, x, dims, Zeros.UNKNOWN)


@implements("_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", table=PROOF)
def _along(prop, name, shape, x, dim, *args, **kwargs):
    if x.dim == dim % len(shape):
        raise RowsMixedError("it computes a value from all rows together")
    return prop.result(shape, x.dim, x, x.zeros if name == "cumsum" else Zeros.UNKNOWN)


@implements("sort", "topk", "max", "min", "cummax", "cummin", table=PROOF)
def _along_with_indices(prop, name, shapes, x, *args, **kwargs):
    if not isinstance(shapes, list):
        raise RowsMixedError("it computes a value from all rows together")
    position = 1 if name == "topk" else 0  # of the dimension among the arguments: `topk` has k in front
    dim = kwargs.get("dim", args[position] if len(args) > position else -1)
    return [_reduce(prop, shape, x, {dim % len(x.shape)}, Zeros.UNKNOWN) for shape in shapes]


@implements("_softmax_backward_data", "_log_softmax_backward_data", table=PROOF)
def _softmax_backward(prop, name, shape, grad, out, dim, dtype):
    if dim % len(shape) in (grad.dim, out.dim):
        raise RowsMixedError("it computes a value from all rows together")
    # The gradient is zero where the incoming one is, as a product would be.
    return pointwise(prop, "softmax" if grad.zeros == Zeros.UNKNOWN else "mul", shape, grad, out)
