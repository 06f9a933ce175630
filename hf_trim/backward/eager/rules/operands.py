"""
What rules ask of their operands, and how they get the kept rows of them.

e.g. in `grad * scale` with `grad` `[B, T, C]`, B = 4, rows 1 and 3 kept: `kept_payloads` returns `[2, T, C]` for
`grad`, `[2, T, 1]` for a `scale` of shape `[B, T, 1]`, and a `scale` of shape `[C]` or `[1, T, C]` as it is.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from hf_trim.backward.eager.tensor import RowSparseTensor, RowTensor
from hf_trim.backward.registry import NotRowwiseError, require


def require_row_sparse(x: Any) -> RowSparseTensor:
    """`x`, which must be the row-sparse operand."""
    require(isinstance(x, RowSparseTensor), "this operand is expected to be the row-sparse one")
    return x


def is_zeros(x: Tensor | float) -> bool:
    """
    Whether an operand is zero outside the kept rows: if it is not row-sparse, then by being zeros, which autograd has
    in the place of an undefined gradient, or of one that was overwritten.
    """
    if isinstance(x, RowSparseTensor):
        return True
    if not isinstance(x, Tensor):
        return x == 0
    return not (x if any(x.stride()) else x[(slice(1),) * x.ndim]).any()  # looking at one entry if they are expanded


def find_reference(args: Iterable[Any], kind: type[RowTensor] = RowSparseTensor) -> RowTensor:
    """The first operand that carries rows: all operands must have its rows, in its layout."""
    for x in args:
        if isinstance(x, kind):
            return x
    raise NotRowwiseError("the row-sparse operand is passed by keyword")


def kept_payloads(ref: RowTensor, args: tuple, kwargs: dict) -> list:
    """The arguments of an elementwise op, with the kept rows of its operands."""
    if kwargs:
        require(not any(isinstance(x, Tensor) for x in kwargs.values()), "a tensor passed by keyword")
    dim = ref.row_dim - ref.ndim  # broadcasting aligns dimensions from the right
    return [
        x.payload if x is ref else ref.kept_rows_or_broadcast(x, dim) if isinstance(x, Tensor) and x.ndim else x
        for x in args
    ]


def run_by_row(func, ref: RowTensor, args: tuple, kwargs: dict) -> RowTensor:
    """Runs an elementwise op on the kept rows of its operands."""
    dim = ref.row_dim - ref.ndim
    out = func(*kept_payloads(ref, args, kwargs), **kwargs)
    require(out.shape[dim] == ref.payload.shape[dim], "rows are broadcast")
    return ref.like(out, dim + out.ndim)
