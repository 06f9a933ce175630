"""
Sums, norms and matrix products. Along the rows they are complete without the rows that are zero.

e.g. `grad.sum(0)` of `[B·T, C]`, B = 4, T = 2, rows 1 and 3 kept: the ordinary tensor `[C]`, summed over the payload
`[2·2, C]`. `grad.sum(1)` is row-sparse, `[B·T]` with the payload `[2·2]`.
"""

from math import prod

import torch

from hf_trim.backward.eager.rules.operands import require, require_other_dim, require_row_sparse
from hf_trim.backward.eager.tensor import RowSparseTensor
from hf_trim.backward.registry import ACTIVATIONS, GRADIENTS, implements


aten = torch.ops.aten

# ---- reductions --------------------------------------------------------------------------------------------------


def _reduced_dims(x, dim) -> list[int]:
    dims = range(x.ndim) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return [d % x.ndim for d in dims]


@implements("sum", "sum.dim_IntList", "mean", "mean.dim")
def sum_(func, x, dim=None, keepdim=False, dtype=None):
    """Sums over rows are complete without the rows that are zero; a mean divides by the logical count."""
    dims = _reduced_dims(x, dim)
    if x.row_dim not in dims:
        rows_dim = x.row_dim if keepdim else x.row_dim - sum(d < x.row_dim for d in dims)
        return x.like(func(x.payload, dims, keepdim, dtype=dtype), rows_dim)
    out = x.payload.sum(dims, keepdim, dtype=dtype)
    if func in (aten.mean.default, aten.mean.dim):
        out /= prod(x.shape[d] for d in dims)
    return out


@implements("any")
def any_(func, x):
    return func(x.payload)


@implements("linalg_vector_norm")
def vector_norm(func, x, ord=2, dim=None, keepdim=False, dtype=None):
    dims = _reduced_dims(x, dim)
    # A norm of each row runs dense. Zeros change those of order 0 and below.
    require(ord > 0 and x.row_dim in dims, "rows keep a norm of their own")
    return func(x.payload, ord, dims, keepdim, dtype=dtype)


@implements("cumsum", table=(GRADIENTS, ACTIVATIONS))
def cumsum(func, x, dim, dtype=None):
    return x.like(func(x.payload, require_other_dim(x, dim), dtype=dtype))


# ---- matrix products ---------------------------------------------------------------------------------------------


@implements("mm", "bmm")
def matmul(func, a, b):
    """`[n, m] @ [m, p]`, with or without a batch dimension: rows along n or p stay, rows along m are summed."""
    first = 0 if func is aten.mm.default else 1  # where the matrix dimensions begin
    ref = a if isinstance(a, RowSparseTensor) else b
    if ref.row_dim < first:
        return ref.like(func(ref.kept_rows(a, 0), ref.kept_rows(b, 0)), 0)
    summed = first + 1 if ref is a else first
    if ref.row_dim == summed:  # the gradient of a weight: what the zero rows would add is zero
        return func(ref.kept_rows(a, first + 1), ref.kept_rows(b, first))
    require(
        not (isinstance(a, RowSparseTensor) and isinstance(b, RowSparseTensor)),
        "both operands carry rows, in different dimensions",
    )
    return ref.like(func(ref.payload, b) if ref is a else func(a, ref.payload))


@implements("addmm", "baddbmm")
def addmm(func, x, a, b, beta=1, alpha=1):
    """Rewritten as its parts, which have rules of their own."""
    product = torch.mm(a, b) if func is aten.addmm.default else torch.bmm(a, b)
    return x * beta + product * alpha


@implements("mv", "dot")
def product_with_vector(func, a, b):
    ref = a if isinstance(a, RowSparseTensor) else b
    if ref.row_dim == ref.ndim - 1:
        return func(ref.kept_rows(a, a.ndim - 1), ref.kept_rows(b, 0))
    return ref.like(func(require_row_sparse(a).payload, b), 0)
