"""
The kept rows of a graph's inputs, and its outputs as row-sparse gradients.

Example: samples 1 and 3 of B = 4 are kept, T = 5. A saved tensor `[20, C]` holds `[B*T, C]`: rows in dimension 0,
outer 1, inner T = 5. `take_rows` gives `[2*T, C]` = `[10, C]`, entries 5 … 9 and 15 … 19. If the graph needs 3 rows
at least, `pad_rows` makes the rows 1, 3, 3, and `take_rows` gives `[15, C]`.
"""

import torch
from torch import Tensor

from hf_trim.backward._torch_internals import shares_memory
from hf_trim.backward.eager.tensor import Rows, RowSparseTensor


_ALIGNMENT = 16  # bytes that inductor's kernels rely on

RowLayout = tuple[int, int, int]  # the dimension that carries rows, and what is merged in front of and behind them


def pad_rows(rows: Rows, count: int) -> Rows:
    """The kept rows, with the last of them repeated until there are `count`."""
    padded = Rows(rows.index, rows.batch)
    if count > rows.count:
        padded.index = torch.cat([rows.index, rows.index[-1:].expand(count - rows.count)])
        padded.count, padded.start = count, None
    return padded


def take_rows(
    x: Tensor,
    rows: Rows,
    layout: RowLayout,
    shape: list[int],
    strides: list[int],
    orders: tuple[list[int], list[int]] | None,
    copy: bool,
) -> Tensor:
    """
    Args:
        x (`torch.Tensor`): An input for the whole batch.
        rows ([`~hf_trim.backward.eager.rows.Rows`]): The rows to take.
        layout (`tuple[int, int, int]`): Dimension, outer and inner size of the rows in `x`.
        shape (`list[int]`): The shape of the result.
        strides (`list[int]`): The strides that the graph was compiled for.
        orders (`tuple[list[int], list[int]]`, *optional*): The order of the dimensions in which these strides are
            contiguous, and the one back.
        copy (`bool`): Whether the result must not share memory with `x`.

    Returns:
        `torch.Tensor`: These rows of `x`.
    """
    if orders is not None and rows.start is None and not (x.is_conj() or x.is_neg()):
        # Few calls: a graph has hundreds of inputs.
        dim, _, inner = layout
        if x.is_contiguous():
            return x.index_select(dim, rows.entries(inner, x.device))
        order, back = orders
        ordered = x.permute(order)
        if ordered.is_contiguous():
            return ordered.index_select(back[dim], rows.entries(inner, x.device)).permute(back)
    part = rows.take(x, *layout)
    rows.forget_slice()  # the graph may reuse the memory of its inputs: a slice must not serve twice
    fits = all(size == 1 or a == b for size, a, b in zip(shape, part.stride(), strides, strict=True))
    if fits and not (shares_memory(part, x) and (copy or part.storage_offset() * part.element_size() % _ALIGNMENT)):
        return part
    return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device).copy_(part)


def clear_padding(grad: Tensor, rows: Rows, count: int, layout: RowLayout) -> None:
    """Sets the padded rows of an incoming gradient to zero, so that they add nothing to sums over rows."""
    dim, outer, inner = layout
    split = grad.unflatten(dim, (outer, count, inner))
    split.narrow(dim + 1, rows.count, count - rows.count).zero_()


def to_row_sparse(grad: Tensor, rows: Rows, count: int, layout: RowLayout) -> RowSparseTensor:
    """A gradient that the graph returned for `count` rows, without the padded ones, as one for the whole batch."""
    dim, outer, inner = layout
    if count > rows.count:
        kept = grad.unflatten(dim, (outer, count, inner)).narrow(dim + 1, 0, rows.count)
        grad = kept.flatten(dim, dim + 2)
    return RowSparseTensor(grad, rows, dim, outer, inner)


def holds_row_numbers(index: Tensor) -> bool:
    """Whether an index is 0, 1, 2, …"""
    return torch.equal(index, torch.arange(len(index), dtype=index.dtype, device=index.device))
