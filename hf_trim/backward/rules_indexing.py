"""Rules for indexing, gathering and scattering."""

import torch

from hf_trim.backward.rules import first_row_sparse, other_dim, require, row_sparse, rule
from hf_trim.backward.tensor import RowSparseTensor


def kept_size(grad, size, dim):
    """`size` with the kept rows along `dim`, which must carry the gradient's rows."""
    require(size[dim] == grad.shape[grad.dim], "the source has other rows")
    return [grad.values.shape[grad.dim] if d == dim else n for d, n in enumerate(size)]


@rule("select_backward")
def select_backward(func, grad, size, dim, index):
    dim %= len(size)
    rows_dim = row_sparse(grad).dim + (dim <= grad.dim)
    return grad.like(func(grad.values, kept_size(grad, size, rows_dim), dim, index), rows_dim)


@rule("slice_backward")
def slice_backward(func, grad, size, dim, start, end, step):
    other_dim(row_sparse(grad), dim)
    return grad.like(func(grad.values, kept_size(grad, size, grad.dim), dim, start, end, step))


@rule("unfold_backward")
def unfold_backward(func, grad, size, dim, length, step):
    require(row_sparse(grad).dim < len(size) and grad.dim != dim % len(size), "it works along the rows")
    return grad.like(func(grad.values, kept_size(grad, size, grad.dim), dim, length, step))


@rule("value_selecting_reduction_backward")
def selecting_backward(func, grad, dim, indices, size, keepdim):
    dim %= len(size)
    rows_dim = row_sparse(grad).dim + (not keepdim and dim <= grad.dim)
    require(rows_dim != dim, "it works along the rows")
    return grad.like(func(grad.values, dim, grad.take(indices), kept_size(grad, size, rows_dim), keepdim), rows_dim)


@rule("select_scatter", "slice_scatter")
def scatter_slice(func, x, source, dim=0, *args, **kwargs):
    require(isinstance(x, RowSparseTensor) and isinstance(source, RowSparseTensor), "a dense tensor is joined")
    dim = other_dim(x, dim)
    at = x.dim - (dim < x.dim and source.ndim < x.ndim)
    return x.like(func(x.values, x.take(source, at), dim, *args, **kwargs))


@rule("gather")
def gather(func, x, dim, index, sparse_grad=False):
    dim = other_dim(row_sparse(x), dim)
    return x.like(func(x.values, dim, x.take(index)))


@rule("scatter_add", "scatter.src")
def scatter(func, x, dim, index, source):
    require(isinstance(x, RowSparseTensor) and isinstance(source, RowSparseTensor), "a dense tensor is joined")
    dim = other_dim(x, dim)
    return x.like(func(x.values, dim, x.take(index), x.take(source)))


@rule("scatter.value")
def scatter_value(func, x, dim, index, value):
    require(value == 0, "the result is not zero outside the kept rows")
    return row_sparse(x).like(func(x.values, other_dim(x, dim), x.take(index), value))


@rule("index_select")
def index_select(func, x, dim, index):
    dim = other_dim(row_sparse(x), dim)
    return x.like(func(x.values, dim, index))


@rule("index_add", "index_copy")
def index_add(func, x, dim, index, source, **kwargs):
    require(isinstance(x, RowSparseTensor) and isinstance(source, RowSparseTensor), "a dense tensor is joined")
    dim = other_dim(x, dim)
    return x.like(func(x.values, dim, index, x.take(source), **kwargs))


@rule("index.Tensor")
def index(func, x, indices):
    require(x.dim == 0 and indices[0] is None, "it works along the rows")
    return x.like(func(x.values, indices), 0)


@rule("index_put", "_unsafe_index_put")
def index_put(func, x, indices, source, accumulate=False):
    """Backward of advanced indexing: `x[:, columns]`, or `x[arange(B), positions]` as decoder classifiers have it."""
    ref = first_row_sparse((x, source))
    require(isinstance(x, RowSparseTensor) and isinstance(source, RowSparseTensor), "a dense tensor is joined")
    require(x.rows is source.rows and x.dim == source.dim == 0, "operands carry different rows")
    require(all(i is None or i.dtype == torch.long for i in indices), "a mask is not counted by rows")
    if indices[0] is None:
        require(x.inner == source.inner and x.outer == source.outer, "operands carry different rows")
        return x.like(func(x.values, indices, source.values, accumulate))
    # The indices are broadcast to the leading dimensions of `source`, whose first one carries the rows.
    require(None not in indices and source.ndim == x.ndim - len(indices) + max(i.ndim for i in indices), "mixed")
    at = -max(i.ndim for i in indices)
    kept = [ref.take_or_broadcast(i, at) for i in indices]
    numbers, own = kept[0], x.rows.index
    layout = (x.outer, x.inner, source.outer, source.inner)
    require(layout == (1, 1, 1, 1) and numbers.ndim == -at and numbers.shape[0] == own.numel(), "rows are shuffled")
    own = own.view(-1, *[1] * (numbers.ndim - 1))
    require(bool((numbers == own).all()), "rows are shuffled")
    own = torch.arange(own.numel(), device=own.device).view(own.shape)
    return x.like(func(x.values, [own, *kept[1:]], source.values, accumulate))
