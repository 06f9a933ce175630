"""
Proof rules of ops that look up or write entries by an index.

Example: `hidden[torch.arange(B), last]` takes the last token of each text, `[s0, 16]` of `[s0, 5, 16]`. Its backward
is `index_put(zeros, [rows, last], grad, accumulate=True)`. With rows 1 and 3 of 4 kept, `rows` must hold 0 and 1
instead of 1 and 3, and `last` and `grad` are sliced. So the proof demands that `rows` is 0, 1, 2, 3 for the whole
batch, which is checked in each call. Looked up by any other number, a row could be another one's.
"""

import torch

from hf_trim.backward._compile_internals import traced_value
from hf_trim.backward.compiled.values import Value, Zeros, check_no_rows, check_same_dim, check_sum_over_rows
from hf_trim.backward.registry import PROOF, implements, require


# Ops that may use the number of a row, for their rules check how.
INDEXING = ("index", "_unsafe_index", "index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate")


def _look_up(prop, x: Value, indices: list) -> tuple[int | None, Value | None, bool, int]:
    """
    What `x[indices]` looks up.

    Returns:
        `tuple`: The dimension of `x[indices]` that carries rows, and a value with their layout; whether these are the
        rows of `x`, each looked up in itself; and the number of dimensions of `x[indices]`.
    """
    by_dim = {d: index for d, index in enumerate(indices) if index is not None}
    free = [d for d in range(x.ndim) if d not in by_dim]
    common = max(index.ndim for index in by_dim.values())  # dimensions of the indices' common shape
    # In `x[:, i, j]` they are in the place of those that are looked up; in `x[i, :, j]` they come first.
    first, last = min(by_dim), max(by_dim)
    first = first if last - first < len(by_dim) else 0
    ndim, carriers = len(free) + common, [index for index in by_dim.values() if index.row_dim is not None]
    if x.row_dim in free and not carriers:
        in_front = free.index(x.row_dim)
        return (in_front if in_front < first else in_front + common), x, True, ndim
    check_same_dim(index.row_dim - index.ndim for index in carriers)
    layout = prop.common_layout(carriers) or (carriers[0] if carriers else None)
    uses_numbers = x.is_row_index or any(index.is_row_index for d, index in by_dim.items() if d != x.row_dim)
    require(not uses_numbers, "a value depends on the number of a row")
    row_dim = None if layout is None else first + common + layout.row_dim - layout.ndim
    if x.row_dim is None:
        return row_dim, layout, False, ndim
    require(x.row_dim in by_dim, "it may look up entries of other rows")
    row_index = by_dim[x.row_dim]
    if not row_index.is_row_index:
        # The forward pass may have made the row index, `torch.arange(B)`, and saved it.
        saved = None if row_index.source is None else traced_value(row_index.source)
        is_input = saved is not None and saved.ndim == 1 and saved.dtype in (torch.int64, torch.int32)  # no mask
        require(is_input and row_index.outer == row_index.inner == 1, "it may look up entries of other rows")
        prop.use_as_row_index(row_index)
    require(x.outer is None or x.outer == x.inner == 1, "it looks up rows in a dimension that is merged with others")
    return row_dim, layout, True, ndim


@implements("index", "_unsafe_index", table=PROOF)
def _index(prop, name, shape, x, indices):
    row_dim, layout, by_row, _ = _look_up(prop, x, indices)
    known = by_row or row_dim is None or x.zeros == Zeros.EVERYWHERE
    return prop.result(shape, row_dim, layout, x.zeros if known else Zeros.UNKNOWN, x.is_row_index)


@implements("index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate", table=PROOF)
def _index_put(prop, name, shape, x, *args):
    mask = args[0] if "masked" in name else None
    indices, values, *accumulate = args[1:] if "masked" in name else args
    require(not values.is_row_index and not x.is_row_index, "a value depends on the number of a row")
    row_dim, layout, by_row, ndim = _look_up(prop, x, indices)
    zeros = min(x.zeros, values.zeros)
    if row_dim is None:
        check_no_rows(values, mask)
        return prop.result(shape, zeros=zeros)
    # Values and mask may have fewer dimensions than `x[indices]`, aligned at the end.
    carriers = [value for value in (values, mask) if value is not None and value.row_dim is not None]
    check_same_dim([row_dim - ndim, *(value.row_dim - value.ndim for value in carriers)])
    layout = prop.common_layout([layout, *carriers])
    if by_row:
        return prop.result(shape, x.row_dim, layout, zeros)
    require("accumulate" in name or any(accumulate), "rows overwrite each other in a tensor that has none")
    check_sum_over_rows(values.zeros)
    return prop.result(shape, zeros=zeros)
