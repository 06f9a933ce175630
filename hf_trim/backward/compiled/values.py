"""
What the proof knows of a tensor in a backward graph.

Example: the input of a linear layer, saved as `[s0*5, 16]` (B·T, C), is
`Value(shape=(5*s0, 16), row_dim=0, outer=1, inner=5, zeros=Zeros.UNKNOWN)`: dimension 0 carries rows, with 5 tokens
merged behind each. For rows 1 and 3 of 4 that is `[10, 16]` of `[20, 16]`. The gradient of its output has the same
shape and rows, and `zeros=Zeros.OUTSIDE_KEPT`. The weight is `Value(shape=(16, 16))`: it has no rows.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import sympy
from torch import fx

from hf_trim.backward._torch_internals import tree_iter
from hf_trim.backward.registry import require


class Zeros(IntEnum):
    """
    Where a value is known to be zero. A greater member says more: a product has the greatest of its factors, a sum the
    least of its terms. Zero times infinity counts as zero.
    """

    UNKNOWN = 0  # it may be nonzero anywhere
    OUTSIDE_KEPT = 1  # zero in all rows that are not kept
    EVERYWHERE = 2


@dataclass(frozen=True)
class Value:
    """
    What is known of a tensor in a backward graph.

    Args:
        shape (`tuple[sympy.Expr, ...]`): Its symbolic shape.
        row_dim (`int`, *optional*): The dimension that carries rows; `None` if the tensor is the same for any rows.
        outer (`sympy.Expr`, *optional*): Size of what is merged in front of the rows in that dimension; `None` if the
            tensor is equal all along it, so that rows may be anywhere.
        inner (`sympy.Expr`, *optional*): The same behind the rows.
        zeros ([`Zeros`]): Where it is zero.
        is_row_index (`bool`): Whether it holds the number of each row, 0 … B − 1.
        source (`torch.fx.Node`, *optional*): The input of the graph that it is, but for dimensions of size 1.
        origin (`torch.fx.Node`, *optional*): The saved tensor that it has its `outer` and `inner` from.
        unknown (`str`): Why nothing is known; empty if something is.
    """

    shape: tuple
    row_dim: int | None = None
    outer: Any = None
    inner: Any = None
    zeros: Zeros = Zeros.UNKNOWN
    is_row_index: bool = False
    source: fx.Node | None = None
    origin: fx.Node | None = None
    unknown: str = ""

    @property
    def ndim(self) -> int:
        """Number of its dimensions."""
        return len(self.shape)


def values_in(args: Any) -> Iterator[Value]:
    """The tensors among the arguments of an op."""
    return (x for x in tree_iter(args) if isinstance(x, Value))


def zeros_of(x: Any) -> Zeros:
    """Where an operand, tensor or number, is zero."""
    if isinstance(x, Value):
        return Zeros.UNKNOWN if x.unknown else x.zeros
    return Zeros.EVERYWHERE if isinstance(x, (int, float)) and x == 0 else Zeros.UNKNOWN


def is_equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two sizes are equal for all values of their symbols."""
    return sympy.expand(a - b) == 0


def is_integral(size: sympy.Expr) -> bool:
    """Whether a quotient of sizes, such as `5*s0/s0`, is an integer for all values of its symbols."""
    numerator, denominator = sympy.fraction(sympy.cancel(size))
    return denominator == 1 and numerator != 0


def check_no_rows(*operands: Any) -> None:
    """Raises if an operand that an op uses for all rows alike, such as a weight, carries rows."""
    has_rows = any(isinstance(x, Value) and x.row_dim is not None for x in operands)
    require(not has_rows, "an operand that is used for all rows carries rows itself")


def check_same_dim(dims: Iterable) -> None:
    """Raises if operands carry rows in different dimensions."""
    require(len(set(dims)) <= 1, "its operands carry rows in different dimensions")


def check_sum_over_rows(zeros: Zeros) -> None:
    """Raises if the sum over the kept rows may not be the whole sum of terms that are zero there."""
    require(zeros != Zeros.UNKNOWN, "it sums over the batch, and the terms may be nonzero outside of the kept rows")
