"""
Indexing along the rows, and advanced indexing. Other indexing follows from the facts.

What is looked up along the rows has rows of its own: the entries that come from kept ones. e.g. B = 4 samples of T = 2
tokens `[B·T, C]`, sample 1 kept, and an expert that gets the tokens 0, 3 and 5, `x[[0, 3, 5]]`: what reaches the
expert backwards is a `[3, C]` with the payload `[1, C]`, for token 3. The gradient of the lookup puts it back to the
token's place in `[B·T, C]`, which has the rows of the batch. So has `x[arange(B), positions]` of `[B, T, C]`.
"""

from math import prod

import torch
from torch import Tensor

from hf_trim.backward import waiting
from hf_trim.backward.eager.rows import Rows
from hf_trim.backward.eager.rules.derived import derived_rule
from hf_trim.backward.eager.rules.operands import is_zeros, require_row_sparse
from hf_trim.backward.eager.tensor import RowSparseTensor
from hf_trim.backward.facts import FACTS
from hf_trim.backward.registry import implements, require


_index_select, _index_add = derived_rule(FACTS["index_select"]), derived_rule(FACTS["index_add"])


def lookup(x, index) -> tuple[Rows, int, Tensor, Tensor]:
    """
    What entries `index`, `[n]`, along the rows of `x` are: rows, and how many entries each has; which of the n these
    hold, and where they are in the payload. (−1: an entry of zeros, in a row of the batch that has others.)
    """
    require(len(index) > 0, "nothing is selected")
    places = x.rows.places(x.row_outer, x.row_inner, index.device)[index]
    rows, inner = x.rows.of_entries(places >= 0)
    kept = rows.take(torch.arange(len(index), device=index.device), 0, 1, inner)
    return rows, inner, kept, places[kept]


def clear(x, dim, is_zero) -> Tensor:
    """Sets some entries of a dimension to zero, in place."""
    return x.masked_fill_(is_zero.view(-1, *[1] * (x.ndim - 1 - dim % x.ndim)), 0)


@implements("index_select")
def index_select(func, x, dim, index):
    if dim % x.ndim != require_row_sparse(x).row_dim:
        return _index_select(func, x, dim, index)
    rows, inner, _, places = lookup(x, index)
    out = func(x.payload, dim, places.clamp(min=0))
    return RowSparseTensor(clear(out, dim, places < 0), rows, x.row_dim, 1, inner)


@implements("index_fill.int_Scalar")
def index_fill(func, x, dim, index, value):
    require(value == 0, "the result is not zero outside the kept rows")
    if dim % x.ndim == x.row_dim:
        places = x.rows.places(x.row_outer, x.row_inner, index.device)[index]
        index = places[places >= 0]
    return x.like(func(x.payload, dim, index, value))


@implements("index_add")
def index_add(func, x, dim, index, source, **kwargs):
    if dim % x.ndim != require_row_sparse(source).row_dim:
        return _index_add(func, x, dim, index, source, **kwargs)
    index = source.kept_rows(index, 0)
    return add_entries(x, source, dim, index, lambda out, i: func(out, dim, i, source.payload, **kwargs))


def add_entries(x, grad, dim, index, add, is_known=False) -> Tensor:
    """
    What was kept of a gradient, added to some entries of a tensor: a table, or zeros that may have rows. These are
    then those of the batch, or the entries themselves.

    Args:
        x (`torch.Tensor`): The table, or the zeros.
        grad (`RowSparseTensor`): The gradient.
        dim (`int`): The dimension of `x` that has the entries.
        index (`torch.Tensor`): The entries that get something.
        add (`Callable`): Adds it to a tensor, given it and the places of these entries in it.
        is_known (`bool`, *optional*, defaults to `False`): Whether these entries are known to be the kept rows.
    """
    if not isinstance(x, RowSparseTensor):
        return add(x, index)
    size, index = list(x.shape), index % x.shape[dim]
    require(x.row_dim == dim % x.ndim, "it adds to a gradient")
    if is_known and x.row_outer == 1:
        rows, inner = x.rows, x.row_inner
    else:
        chosen = torch.zeros(size[dim], dtype=torch.bool, device=index.device)
        rows, inner = grad.rows.of_entries(chosen.index_fill_(0, index.flatten(), True))
    places = rows.places(1, inner, index.device)[index]
    if x.layout_of_rows() == (rows, x.row_dim, 1, inner):
        return x.like(add(x.payload, places))
    require(waiting.are_zeros(x.payload) or not x.payload.any(), "it adds to a gradient")
    size[dim] = rows.count * inner
    return RowSparseTensor(add(x.payload.new_zeros(size), places), rows, x.row_dim, 1, inner)


@implements("masked_scatter_backward")
def masked_scatter_backward(func, grad, mask, size):
    """The gradient of what was written to the entries of a mask, as pictures are into texts."""
    require(require_row_sparse(grad).row_dim == 0, "it works along the rows")
    mask = mask.expand(grad.shape)
    counts, rest = mask.flatten(1).sum(1), prod(size[1:])
    require(rest > 0 and not (counts % rest).any(), "an entry is shared by rows")
    places = grad.rows.places(grad.row_outer, grad.row_inner, grad.device).repeat_interleave(counts // rest)
    entries = (places >= 0).nonzero().flatten()
    rows, inner = grad.rows.of_entries(places >= 0)
    in_order = rows.places(1, inner, entries.device)[entries[places[entries].argsort(stable=True)]]  # of the payload
    values = grad.payload.masked_select(grad.kept_rows(mask)).view(-1, *size[1:])
    out = values.new_zeros(rows.count * inner, *size[1:]).index_copy(0, in_order, values)
    return RowSparseTensor(out, rows, 0, 1, inner)


def index_columns(x, indices) -> tuple[int, int]:
    """
    Which dimension of `x[indices]` carries the rows, and how many dimensions it has, where the indices leave the rows
    alone. e.g. `[B, T, H, C]` indexed by `[:, i]` is `[B, n, H, C]`, but by `[:, i, :, j]` it is `[n, B, H]`: if the
    indexed dimensions stand apart, what they become is in front.
    """
    require(x.row_dim == 0, "it works along the rows")
    places = [d for d, i in enumerate(indices) if i is not None]
    masks = [i for i in indices if i is not None and i.dtype == torch.bool]  # each is like one index of its own
    common = max(1 if indices[d].dtype == torch.bool else indices[d].ndim for d in places)
    ndim = x.ndim + common - len(places) - sum(mask.ndim - 1 for mask in masks)
    return common if places[-1] - places[0] >= len(places) else 0, ndim


def index_rows(indices) -> list:
    """
    Indices of which the first one chooses rows, as numbers: e.g. those of tokens that are sent to an expert, the mask
    of a token of each sample, or `[arange(B)[:, None], positions]` with `[B, n]` positions.
    """
    require(all(i is not None and i.dtype != torch.uint8 for i in indices), "indices and slices are mixed")
    indices = [n for i in indices for n in (i.nonzero().unbind(1) if i.dtype == torch.bool else [i])]
    common = max(i.ndim for i in indices)
    rows = indices[0]
    require(rows.ndim == common > 0 and rows.numel() == len(rows), "each entry chooses a row of its own")
    return [i.long() for i in indices]


def slices_in_front(indices) -> int:
    """How many dimensions are taken whole before the first index."""
    return next(d for d, i in enumerate(indices) if i is not None)


def along(first, indices, kept) -> list:
    """The kept ones of further indices, unless they are broadcast along the first one."""
    return [i if i.ndim < first.ndim or len(i) < len(first) else i.index_select(0, kept) for i in indices]


@implements("index.Tensor", "_unsafe_index.Tensor")
def index(func, x, indices):
    require(isinstance(x, RowSparseTensor), "it selects from a tensor without rows")
    dim = slices_in_front(indices)
    if dim != x.row_dim:
        return x.like(func(x.payload, indices), index_columns(x, indices)[0])
    first, *others = index_rows(indices[dim:])
    rows, inner, kept, places = lookup(x, first.flatten())
    out = func(x.payload, [*indices[:dim], places.view(-1, *first.shape[1:]), *along(first, others, kept)])
    return RowSparseTensor(clear(out, dim, places < 0), rows, dim, 1, inner)


@implements("index_put", "_unsafe_index_put")
def index_put(func, x, indices, source, accumulate=False):
    """
    Backward of advanced indexing: `x[:, columns]`, `x[tokens]` as experts have it, `x[arange(B), positions]` as
    decoder classifiers do, or `x[mask]`, with one token of each sample, as encoder-decoder classifiers do.
    """
    slices = slices_in_front(indices)
    if accumulate and require_row_sparse(source).row_dim >= slices:
        return add_to_entries(func, x, indices, source)
    require(isinstance(x, RowSparseTensor) and is_zeros(source), "a dense tensor is joined")
    if slices != x.row_dim:
        dim, ndim = index_columns(x, indices)
        if isinstance(source, RowSparseTensor):
            require(source.ndim == ndim, "operands are broadcast")
            return x.like(func(x.payload, indices, x.kept_rows(source, dim), accumulate))
        return x.like(func(x.payload, indices, source.new_zeros(()), accumulate))
    require(not isinstance(source, RowSparseTensor), "it works along the rows")
    first, *others = index_rows(indices[slices:])
    places = x.rows.places(x.row_outer, x.row_inner, first.device)[first.flatten()]
    kept = (places >= 0).nonzero().flatten()
    indices = [*indices[:slices], places[kept].view(-1, *first.shape[1:]), *along(first, others, kept)]
    return x.like(func(x.payload, indices, source.new_zeros(()), False))


def add_to_entries(func, x, indices, grad):
    """Backward of a lookup `x[indices]`."""
    slices = slices_in_front(indices)
    front, indices = indices[:slices], indices[slices:]
    if any(i is not None and i.dtype == torch.bool for i in indices):
        indices = index_rows(indices)
    require(all(i is not None and i.dtype == torch.long for i in indices), "only some dimensions are indexed")
    common = max(i.ndim for i in indices)  # dimensions of their common shape, which the gradient has after the slices
    dim = grad.row_dim - slices - common
    require(dim < 0 and grad.ndim == x.ndim - len(indices) + common, "rows are not looked up")
    first, *others = (grad.kept_rows_or_broadcast(i, dim) for i in indices)
    # x[arange(B), positions]: the gradient of sample i goes to sample i.
    is_known = (
        waiting.is_range(indices[0])
        and grad.shape[grad.row_dim] == x.shape[slices]
        and isinstance(x, RowSparseTensor)
        and grad.layout_of_rows() == x.layout_of_rows()
    )
    return add_entries(
        x, grad, slices, first, lambda out, i: func(out, [*front, i, *others], grad.payload, True), is_known
    )
