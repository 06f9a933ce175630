"""
What a line of the table says, and functions that say where the results of an op have their rows.

e.g. `Fact("grad saved", apart(2))` of `glu_backward(grad, x, dim)`: the gradient and the saved input carry the same
rows, and the result has them where the gradient has, if that is not the dimension `dim`.
"""

from collections.abc import Callable, Iterable
from typing import Any

from hf_trim.backward.registry import require


class Fact:
    """
    What is true of an op.

    Args:
        operands (`str`):
            What each argument of the op is, in their order; `.` and those that are not mentioned are the same for all
            rows, as weights and numbers are. `name=shared` is an argument by keyword.

            - `grad` carries rows, and the results are zero wherever all operands of this kind are;
            - `saved` carries the same rows in the same dimension, whatever they hold;
            - `shared` carries them in the same dimension counted from the last one, or is broadcast over them;
            - `size` is a size that counts the rows.
        place (`Callable`):
            Arguments of the op → the dimension in which the result carries the rows, merged with the same sizes as in
            the operands; `None` for a sum over the rows; a tuple of these for several results, of which those behind
            its end have no rows (the random state of a kernel). It raises
            [`~hf_trim.backward.registry.NotRowwiseError`] if rows are mixed. Of operands it reads `shape`, `ndim` and
            `row_dim`: numbers of a [`~hf_trim.backward.eager.tensor.RowTensor`], or formulas of symbols of a
            [`~hf_trim.backward.compiled.values.Value`].
        needs_batch (`Callable`, *optional*):
            Arguments of the op → whether it has to run on the whole batch although its rows stay apart: it reads what
            cannot be sliced, such as a sample's place in the batch, by which a kernel draws its dropout mask.
    """

    def __init__(self, operands: str, place: Callable[..., Any], needs_batch: Callable[..., bool] | None = None):
        kinds = operands.split()
        self.place, self.needs_batch = place, needs_batch
        self.grads, self.rows = _positions(kinds, "grad"), _positions(kinds, "grad", "saved")
        self.shared, self.sizes = _positions(kinds, "shared"), _positions(kinds, "size")
        self.shared_keywords = [kind.removesuffix("=shared") for kind in kinds if "=" in kind]


def _positions(kinds: list[str], *wanted: str) -> tuple[int, ...]:
    return tuple(i for i, kind in enumerate(kinds) if kind in wanted)


def same(x: Any, *_: Any, **__: Any) -> int:
    """Rows stay in their dimension."""
    return x.row_dim


def other_dim(x: Any, dim: int) -> int:
    """`dim` as a non-negative number; it must not be the one that carries rows."""
    dim %= x.ndim
    require(dim != x.row_dim, "it works along the rows")
    return dim


def apart(position: int, default: Any = 0) -> Callable[..., int]:
    """Rows stay in their dimension, which must not be among those that the argument at `position`, `dim`, names."""

    def place(*args: Any, **kwargs: Any) -> int:
        dims = args[position] if len(args) > position else kwargs.get("dim", default)
        for dim in (dims,) if isinstance(dims, int) else dims:
            other_dim(args[0], dim)
        return args[0].row_dim

    return place


def before_last(count: int) -> Callable[..., int]:
    """Rows stay in their dimension, which must be in front of the last `count` ones."""

    def place(x: Any, *_: Any, **__: Any) -> int:
        require(x.row_dim < x.ndim - count, "it works along the rows")
        return x.row_dim

    return place


def first(x: Any, ndim: int | None = None) -> int:
    """The dimension that carries rows, which must be the first one (of `ndim`)."""
    require(x.row_dim == 0 and ndim in (None, x.ndim), "rows are not samples")
    return 0


def transposed(x: Any, dim0: int = 0, dim1: int = 1) -> int:
    """Two dimensions change places."""
    if x.ndim < 2:
        return x.row_dim
    dim0, dim1 = dim0 % x.ndim, dim1 % x.ndim
    return dim1 if x.row_dim == dim0 else dim0 if x.row_dim == dim1 else x.row_dim


def inserted(x: Any, ndim: int, dim: int) -> int:
    """A dimension is new in a result of `ndim` dimensions."""
    return x.row_dim + (dim % ndim <= x.row_dim)


def selected(x: Any, dim: int = 0, *_: Any) -> int:
    """A dimension is gone."""
    return x.row_dim - (other_dim(x, dim) < x.row_dim)


def squeezed_dims(x: Any, dim: int | Iterable[int] | None = None) -> list[int]:
    """The dimensions that `squeeze` removes. That of the rows stays: one kept row of several must not vanish."""
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    return [d % x.ndim for d in dims if x.shape[d] == 1 and d % x.ndim != x.row_dim]


def squeezed(x: Any, dim: int | Iterable[int] | None = None) -> int:
    """Dimensions of size 1 are gone."""
    return x.row_dim - sum(d < x.row_dim for d in squeezed_dims(x, dim))


def sliced(x: Any, shape: Any, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> int:
    """Rows stay in their dimension, of which a slice of `shape` must take all. `x[1:]` ends at the largest integer."""
    if dim % x.ndim == x.row_dim:
        size = shape[dim]
        goes_on = isinstance(end, int) and end >= (size if isinstance(size, int) else 2**62)
        is_full = start in (None, 0) and (end is None or end == size or goes_on) and step == 1
        require(is_full, "it is about a part of the rows")
    return x.row_dim


def reduced_dims(x: Any, dim: int | Iterable[int] | None) -> list[int]:
    """The dimensions that a reduction removes: all of them for `None` and `[]`."""
    dims = [dim] if isinstance(dim, int) else list(dim or ())
    return [d % x.ndim for d in dims] if dims else list(range(x.ndim))


def summed(x: Any, dim: int | Iterable[int] | None = None, keepdim: bool = False, **_: Any) -> int | None:
    """Dimensions are gone, or have size 1. Over the rows it is complete without those that are zero."""
    dims = reduced_dims(x, dim)
    if x.row_dim in dims:
        return None
    return x.row_dim if keepdim else x.row_dim - sum(d < x.row_dim for d in dims)


def reduced(x: Any, dim: int | Iterable[int] | None = None, keepdim: bool = False, **_: Any) -> int:
    """The same, but not over the rows."""
    row_dim = summed(x, dim, keepdim)
    require(row_dim is not None, "it computes a value from all rows together")
    return row_dim  # type: ignore[return-value]


def product_dims(a: Any, b: Any) -> tuple[int | None, int | None, int | None]:
    """
    Where `a`, `b` and their product `[n, m] @ [m, p]`, with or without a batch dimension, carry rows. Along the batch,
    n or p they stay apart; along m they are summed.

    e.g. `a` with rows along n: `(0, None, 0)`, since `b` must not have any.
    """
    first_of_matrix = a.ndim - 2
    rows_a, rows_b = getattr(a, "row_dim", None), getattr(b, "row_dim", None)
    if first_of_matrix and 0 in (rows_a, rows_b):
        return 0, 0, 0
    if rows_a == first_of_matrix + 1 or rows_b == first_of_matrix:
        return first_of_matrix + 1, first_of_matrix, None
    require(rows_a is None or rows_b is None, "both operands carry rows, in different dimensions")
    return rows_a, rows_b, rows_b if rows_a is None else rows_a


def loss(x: Any, reduction: int, *others: Any) -> int:
    """Rows stay in their dimension; the loss must have a value for each entry of its operands."""
    require(reduction == 0 and all(x.shape == other.shape for other in others), "the loss is reduced")
    return x.row_dim


def attention(x: Any, *packed: Any, bias: Any = None) -> int:
    """
    Rows are samples of `[B, H, T, D]`, which are not packed one behind the other. A `bias` that wants a gradient has
    one for each of them.
    """
    require(all(ends is None for ends in packed), "sequences are packed")
    require(bias is None or bias.shape[0] == x.shape[0], "the gradient of a bias is summed over the rows")
    return first(x, 4)


def always(*_: Any, **__: Any) -> bool:
    """It needs the whole batch whatever its arguments are."""
    return True


def drops(position: int) -> Callable[..., bool]:
    """Whether the argument at `position`, the share of entries that a kernel drops, is not zero."""
    return lambda *args, **kwargs: bool(args[position] if len(args) > position else kwargs.get("dropout_p", 0))
