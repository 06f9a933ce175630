"""
Proof rules of ops that look up or write entries by an index.

Example: `hidden[torch.arange(B), last]` takes the last token of each text, `[s0, 16]` of `[s0, 5, 16]`. Its backward
is `index_put(zeros, [rows, last], grad, accumulate=True)`. With rows 1 and 3 of 4 kept, `rows` must hold 0 and 1
instead of 1 and 3, and `last` and `grad` are sliced. So the proof demands that `rows` is 0, 1, 2, 3 for the whole
batch, which is checked in each call. Looked up by any other number, a row could be another one's.
"""

from dataclasses import replace

import torch

from hf_trim.backward._torch_internals import traced_value
from hf_trim.backward.compiled.values import Value, Zeros, check_no_rows, check_same_dim, check_sum_over_rows
from hf_trim.backward.registry import PROOF, NotRowwiseError, implements, require


# Ops that may use the number of a row, for their rules check how.
INDEXING = ("index", "_unsafe_index", "index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate")


def _check_indices(prop, x: Value, indices: list) -> tuple[Value | None, bool]:
    """
    Checks what `x[indices]` and its backward op look up. `x[i, j]` with a row index i looks up each row in itself.

    Returns:
        `tuple[Value | None, bool]`: An index that carries rows, if there is one (its dimensions are the last ones of
        the common shape of all indices), and whether `x` carries rows that are looked up by a row index.
    """
    by_dim = {d: index for d, index in enumerate(indices) if index is not None}
    carriers = [index for index in by_dim.values() if index.row_dim is not None]
    check_same_dim(index.row_dim - index.ndim for index in carriers)
    carrier = prop.common_layout(carriers) or (carriers[0] if carriers else None)
    if x.is_row_index or any(index.is_row_index for d, index in by_dim.items() if d != x.row_dim):
        raise NotRowwiseError("a value depends on the number of a row")
    if x.row_dim is None:
        return carrier, False
    if x.row_dim not in by_dim:
        raise NotRowwiseError(
            "it may look up entries of other rows"
            if carriers
            else "it looks up the same entries for all rows, together with rows"
        )
    row_index = by_dim[x.row_dim]
    if not row_index.is_row_index:
        # The forward pass may have made the row index, `torch.arange(B)`, and saved it.
        saved = None if row_index.source is None else traced_value(row_index.source)
        is_input = saved is not None and saved.ndim == 1 and saved.dtype in (torch.int64, torch.int32)  # no mask
        if not (is_input and row_index.outer == row_index.inner == 1):
            raise NotRowwiseError("it may look up entries of other rows")
        prop.use_as_row_index(row_index)
    require(x.outer is None or x.outer == x.inner == 1, "it looks up rows in a dimension that is merged with others")
    return carrier, True


def _place_of_indices(indices) -> tuple[int, int]:
    """
    The first dimension of the indices' common shape in `x[indices]`, and its number of dimensions. In `x[:, i, j]`, it
    is in the place of the dimensions that are looked up; in `x[i, :, j]`, it comes first.
    """
    dims = [d for d, index in enumerate(indices) if index is not None]
    common = max(len(index.shape) for index in indices if index is not None)
    return (dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0), common


def _free_dims(x: Value, indices: list) -> list[int]:
    """The dimensions of `x` that `x[indices]` takes as they are."""
    return [d for d in range(len(x.shape)) if d >= len(indices) or indices[d] is None]


def _free_row_dim(x: Value, indices: list) -> int | None:
    """The dimension of `x[indices]` that carries rows, if the same entries of each row are taken; else `None`."""
    free = _free_dims(x, indices)
    if x.row_dim not in free or any(index is not None and index.row_dim is not None for index in indices):
        return None
    first, common = _place_of_indices(indices)
    in_front = sum(d < x.row_dim for d in free)
    return in_front if in_front < first else in_front + common


@implements("index", "_unsafe_index", table=PROOF)
def _index(prop, name, shape, x, indices):
    row_dim = _free_row_dim(x, indices)
    if row_dim is not None:
        return prop.result(shape, row_dim, x, x.zeros, x.is_row_index)
    carrier, by_row = _check_indices(prop, x, indices)
    if carrier is None:
        return prop.result(shape, zeros=x.zeros)
    first, common = _place_of_indices(indices)
    row_dim = first + common + carrier.row_dim - len(carrier.shape)
    return prop.result(shape, row_dim, carrier, x.zeros if by_row or x.zeros == Zeros.EVERYWHERE else Zeros.UNKNOWN)


@implements("index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate", table=PROOF)
def _index_put(prop, name, shape, x, *args):
    mask = args[0] if "masked" in name else None
    indices, values, *accumulate = args[1:] if "masked" in name else args
    adds = "accumulate" in name or bool(accumulate and accumulate[0])
    first, common = _place_of_indices(indices)
    dims = len(_free_dims(x, indices)) + common  # of `x[indices]`; values may have fewer, aligned at the end
    if values.is_row_index or x.is_row_index:
        raise NotRowwiseError("a value depends on the number of a row")
    row_dim = _free_row_dim(x, indices)
    if row_dim is not None:
        check_no_rows(mask)
        require(values.row_dim is not None, "rows are overwritten alike")
        check_same_dim((values.row_dim - values.ndim, row_dim - dims))
        return prop.result(shape, x.row_dim, prop.common_layout([x, values]), min(x.zeros, values.zeros))
    carrier, by_row = _check_indices(prop, x, indices)
    if carrier is None:
        check_no_rows(values, mask)
        return prop.result(shape, zeros=min(x.zeros, values.zeros))
    row_dim = first + common + carrier.row_dim - len(carrier.shape)
    carriers = [value for value in (values, mask) if value is not None and value.row_dim is not None]
    check_same_dim([row_dim - dims, *(value.row_dim - value.ndim for value in carriers)])
    layout = prop.common_layout([carrier, *carriers])
    if by_row:
        return prop.result(
            shape, x.row_dim, replace(x, outer=layout.outer, inner=layout.inner), min(x.zeros, values.zeros)
        )
    require(adds, "rows overwrite each other in a tensor that has none")
    check_sum_over_rows(values.zeros)
    return prop.result(shape, zeros=min(x.zeros, values.zeros))
