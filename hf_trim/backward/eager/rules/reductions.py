"""
Means, norms and matrix products. Along the rows they are complete without the rows that are zero. Other reductions
follow from `facts/table.py`.

e.g. a weight's gradient `grad.t() @ x` of `[B·T, C]` and `[B·T, H]`, B = 4, T = 2, rows 1 and 3 kept: the product of
the payload `[C, 2·2]` and the kept rows of `x`, `[2·2, H]`.
"""

from math import prod

import torch

from hf_trim.backward.eager.rules.operands import require_row_sparse
from hf_trim.backward.eager.tensor import RowSparseTensor, RowTensor
from hf_trim.backward.facts.fact import product_dims, reduced_dims
from hf_trim.backward.registry import ACTIVATIONS, GRADIENTS, implements, require


aten = torch.ops.aten


@implements("mean", "mean.dim")
def mean(func, x, dim=None, keepdim=False, dtype=None):
    dims = reduced_dims(x, dim)
    return torch.sum(x, dims, keepdim, dtype=dtype) / prod(x.shape[d] for d in dims)


@implements("linalg_vector_norm")
def vector_norm(func, x, ord=2, dim=None, keepdim=False, dtype=None):
    dims = reduced_dims(x, dim)
    # A norm of each row runs dense. Zeros change those of order 0 and below.
    require(ord > 0 and x.row_dim in dims, "rows keep a norm of their own")
    return func(x.payload, ord, dims, keepdim, dtype=dtype)


@implements("mm", "bmm", table=(GRADIENTS, ACTIVATIONS))
@implements("addmm", "baddbmm", table=ACTIVATIONS)
def matmul(func, *args, **kwargs):
    *bias, a, b = args
    ref = a if isinstance(a, RowSparseTensor) or not isinstance(b, RowTensor) else b
    require(isinstance(ref, RowTensor), "rows are added to a product without rows")
    dim_a, dim_b, dim = product_dims(a, b)
    require(dim is not None or isinstance(ref, RowSparseTensor), "rows are summed")
    if dim_a is not None:
        a = ref.kept_rows(a, dim_a)
    if dim_b is not None:
        b = ref.kept_rows(b, dim_b)
    if dim is None:  # the gradient of a weight: what the zero rows would add is zero
        return func(a, b)
    bias = [ref.kept_rows_or_broadcast(x, dim - ref.ndim) for x in bias]
    return ref.like(func(*bias, a, b, **kwargs), dim)


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


@implements("_grouped_mm")
def grouped_matmul(func, a, b, ends=None, *args):
    """
    The tokens that were sent to each expert, `[n, m]`, times its matrix of `[E, m, p]`, and the same transposed; or
    the gradient of the matrices, `[m, n] @ [n, p]`. An expert's tokens end at its number in `ends`.
    """
    ref = a if isinstance(a, RowSparseTensor) else b
    tokens = {(2, 3): (0, None), (3, 2): (None, 1), (2, 2): (1, 0)}.get((a.ndim, b.ndim), (None, None))
    require(ends is not None and ref.row_dim == tokens[ref is b], "its rows are not tokens")
    numbers = ref.kept_rows(torch.arange(ref.shape[ref.row_dim], device=ref.device), 0)
    in_order = ref.rows.origin is not None  # those of `Rows.of_entries` are
    require(in_order or bool((numbers.diff() > 0).all()), "tokens are not in order")
    a, b = (x if dim is None else ref.kept_rows(x, dim) for x, dim in zip((a, b), tokens, strict=True))
    out = func(a, b, torch.searchsorted(numbers, ends, out_int32=True), *args)
    return out if None not in tokens else ref.like(out)


@implements("linalg_solve_triangular")
def solve_triangular(func, a, b, **options):
    require(require_row_sparse(b).row_dim < b.ndim - 2, "rows are not those of a batch")
    return b.like(func(b.kept_rows_or_broadcast(a, b.row_dim - b.ndim), b.payload, **options))
