"""
Indexing, gathering and scattering.

e.g. the gradient of `x[:, 0]`, x `[B, T, C]`, B = 4, rows 1 and 3 kept: `select_backward` puts the payload `[2, C]`
into zeros of `[2, T, C]`. The gradient of `x[arange(B), positions]` writes row b of `[B, C]` to row b of `[B, T, C]`:
the index along the rows must count them in order, then the payload is written with `arange(2)` in its place.
"""

import torch

from hf_trim.backward.eager.rules.operands import find_reference, require, require_other_dim, require_row_sparse
from hf_trim.backward.eager.tensor import RowSparseTensor, RowTensor
from hf_trim.backward.registry import ACTIVATIONS, GRADIENTS, implements


def kept_size(grad, size, dim):
    """`size` with the kept rows along `dim`, which must carry the gradient's rows."""
    require(size[dim] == grad.shape[grad.row_dim], "the source has other rows")
    return [grad.payload.shape[grad.row_dim] if d == dim else n for d, n in enumerate(size)]


@implements("select_backward")
def select_backward(func, grad, size, dim, index):
    dim %= len(size)
    rows_dim = require_row_sparse(grad).row_dim + (dim <= grad.row_dim)
    return grad.like(func(grad.payload, kept_size(grad, size, rows_dim), dim, index), rows_dim)


@implements("slice_backward")
def slice_backward(func, grad, size, dim, start, end, step):
    require_other_dim(require_row_sparse(grad), dim)
    return grad.like(func(grad.payload, kept_size(grad, size, grad.row_dim), dim, start, end, step))


@implements("unfold_backward")
def unfold_backward(func, grad, size, dim, length, step):
    require(
        require_row_sparse(grad).row_dim < len(size) and grad.row_dim != dim % len(size), "it works along the rows"
    )
    return grad.like(func(grad.payload, kept_size(grad, size, grad.row_dim), dim, length, step))


@implements("select_scatter", "slice_scatter")
def scatter_slice(func, x, source, dim=0, *args, **kwargs):
    # Zeros, where autograd removes the gradient of what was overwritten. On a GPU the host would wait for the answer.
    zeros = isinstance(source, RowSparseTensor) or (source.device.type == "cpu" and not source.any())
    require(isinstance(x, RowSparseTensor) and zeros, "a dense tensor is joined")
    dim = require_other_dim(x, dim)
    source_dim = x.row_dim - (dim < x.row_dim and source.ndim < x.ndim)
    return x.like(func(x.payload, x.kept_rows(source, source_dim), dim, *args, **kwargs))


@implements("gather", table=(GRADIENTS, ACTIVATIONS))
def gather(func, x, dim, index, sparse_grad=False):
    require(isinstance(x, RowTensor), "it gathers from a tensor without rows")
    dim = require_other_dim(x, dim)
    return x.like(func(x.payload, dim, x.kept_rows(index)))


@implements("scatter_add", "scatter.src")
def scatter(func, x, dim, index, source):
    require(isinstance(x, RowSparseTensor) and isinstance(source, RowSparseTensor), "a dense tensor is joined")
    dim = require_other_dim(x, dim)
    return x.like(func(x.payload, dim, x.kept_rows(index), x.kept_rows(source)))


@implements("scatter.value")
def scatter_value(func, x, dim, index, value):
    require(value == 0, "the result is not zero outside the kept rows")
    return require_row_sparse(x).like(func(x.payload, require_other_dim(x, dim), x.kept_rows(index), value))


@implements("index_select", table=(GRADIENTS, ACTIVATIONS))
def index_select(func, x, dim, index):
    require(isinstance(x, RowTensor), "it selects from a tensor without rows")
    dim = require_other_dim(x, dim)
    return x.like(func(x.payload, dim, index))


@implements("index_add", "index_copy")
def index_add(func, x, dim, index, source, **kwargs):
    require(isinstance(x, RowSparseTensor) and isinstance(source, RowSparseTensor), "a dense tensor is joined")
    dim = require_other_dim(x, dim)
    return x.like(func(x.payload, dim, index, x.kept_rows(source), **kwargs))


@implements("index.Tensor")
def index(func, x, indices):
    require(x.row_dim == 0 and indices[0] is None, "it works along the rows")
    return x.like(func(x.payload, indices), 0)


def add_to_table(func, table, indices, grad):
    """Backward of a lookup `table[indices]` where the indices carry the rows: what was not kept adds nothing."""
    require(None not in indices, "only some dimensions are indexed")
    common = max(i.ndim for i in indices)  # dimensions of the indices' common shape, which the gradient begins with
    dim = grad.row_dim - common
    require(dim < 0 and grad.ndim == table.ndim - len(indices) + common, "rows are not looked up")
    return func(table, [grad.kept_rows_or_broadcast(i, dim) for i in indices], grad.payload, True)


@implements("index_put", "_unsafe_index_put")
def index_put(func, x, indices, source, accumulate=False):
    """Backward of advanced indexing: `x[:, columns]`, or `x[arange(B), positions]` as decoder classifiers have it."""
    ref = find_reference((x, source))
    require(
        all(i is None or i.dtype == torch.long for i in indices),
        "a boolean mask selects an unknown number of entries of each row",
    )
    if accumulate and not isinstance(x, RowSparseTensor):
        return add_to_table(func, x, indices, source)
    require(isinstance(x, RowSparseTensor) and isinstance(source, RowSparseTensor), "a dense tensor is joined")
    require(x.rows is source.rows and x.row_dim == source.row_dim == 0, "operands carry different rows")
    if indices[0] is None:
        require(x.row_inner == source.row_inner and x.row_outer == source.row_outer, "operands carry different rows")
        return x.like(func(x.payload, indices, source.payload, accumulate))
    # The indices are broadcast to the leading dimensions of `source`, whose first one carries the rows.
    require(
        None not in indices and source.ndim == x.ndim - len(indices) + max(i.ndim for i in indices),
        "indices and slices are mixed",
    )
    dim = -max(i.ndim for i in indices)
    kept = [ref.kept_rows_or_broadcast(i, dim) for i in indices]
    numbers, own = kept[0], x.rows.index
    layout = (x.row_outer, x.row_inner, source.row_outer, source.row_inner)
    require(layout == (1, 1, 1, 1) and numbers.ndim == -dim and numbers.shape[0] == own.numel(), "rows are shuffled")
    own = own.view(-1, *[1] * (numbers.ndim - 1))
    require(bool((numbers == own).all()), "rows are shuffled")
    places = torch.arange(own.numel(), device=own.device).view(own.shape)  # of the kept rows in the payload
    return x.like(func(x.payload, [places, *kept[1:]], source.payload, accumulate))
