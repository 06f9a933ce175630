"""
Advanced indexing.

e.g. B = 4, rows 1 and 3 kept: the gradient of `x[arange(B), positions]` writes row b of `[B, C]` to row b of
`[B, T, C]`. The index along the rows must count them in order; the payload is written with `arange(2)` in its place.
"""

import torch

from hf_trim.backward.eager.rules.operands import is_zeros, require_samples
from hf_trim.backward.eager.tensor import RowSparseTensor
from hf_trim.backward.registry import implements, require


def index_payload(x, indices) -> tuple[list, int, int]:
    """
    The indices into the payload that stand for `x[indices]`, which dimension of the result carries the rows, and how
    many dimensions it has. e.g. `[B, T, H, C]` indexed by `[:, i]` is `[B, n, H, C]`, but by `[:, i, :, j]` it is
    `[n, B, H]`: if the indexed dimensions stand apart, what they become is in front.
    """
    require(x.row_dim == 0, "it works along the rows")
    places = [d for d, i in enumerate(indices) if i is not None]
    masks = [i for i in indices if i is not None and i.dtype == torch.bool]  # each is like one index of its own
    common = max(1 if indices[d].dtype == torch.bool else indices[d].ndim for d in places)
    ndim = x.ndim + common - len(places) - sum(mask.ndim - 1 for mask in masks)
    if indices[0] is None:
        return indices, common if places[-1] - places[0] >= len(places) else 0, ndim
    require_samples(x)
    require(len(places) == len(indices), "indices and slices are mixed")
    if masks:  # e.g. the last token of each sample
        require(len(indices) == 1 and masks[0].ndim > 1, "indices and masks are mixed")
        each = masks[0].flatten(1).sum(1)
        require(bool((each == 1).all()), "not one entry of each row is chosen")
        return [x.kept_rows(masks[0])], 0, ndim
    # The indices are broadcast to the leading dimensions of the result, whose first one carries the rows.
    numbers, *others = (x.kept_rows_or_broadcast(i, -common) for i in indices)
    own = x.rows.index.view(-1, *[1] * (common - 1))
    require(numbers.ndim == common and len(numbers) == len(own) and bool((numbers == own).all()), "rows are shuffled")
    return [torch.arange(len(own), device=own.device).view(own.shape), *others], 0, ndim


@implements("index.Tensor")
def index(func, x, indices):
    require(isinstance(x, RowSparseTensor), "it selects from a tensor without rows")
    kept, dim, _ = index_payload(x, indices)
    return x.like(func(x.payload, kept), dim)


def add_to_table(func, table, indices, grad):
    """Backward of a lookup `table[indices]` where the indices carry the rows: what was not kept adds nothing."""
    require(all(i is not None and i.dtype == torch.long for i in indices), "only some dimensions are indexed")
    common = max(i.ndim for i in indices)  # dimensions of the indices' common shape, which the gradient begins with
    dim = grad.row_dim - common
    require(dim < 0 and grad.ndim == table.ndim - len(indices) + common, "rows are not looked up")
    return func(table, [grad.kept_rows_or_broadcast(i, dim) for i in indices], grad.payload, True)


@implements("index_put", "_unsafe_index_put")
def index_put(func, x, indices, source, accumulate=False):
    """
    Backward of advanced indexing: `x[:, columns]`, `x[arange(B), positions]` as decoder classifiers have it, or
    `x[mask]`, with one token of each sample, as encoder-decoder classifiers do.
    """
    if accumulate and not isinstance(x, RowSparseTensor):
        return add_to_table(func, x, indices, source)
    require(isinstance(x, RowSparseTensor) and is_zeros(source), "a dense tensor is joined")
    kept, dim, ndim = index_payload(x, indices)
    if isinstance(source, RowSparseTensor):
        require(source.ndim == ndim, "operands are broadcast")
        return x.like(func(x.payload, kept, x.kept_rows(source, dim), accumulate))
    return x.like(func(x.payload, kept, source.new_zeros(()), accumulate))
