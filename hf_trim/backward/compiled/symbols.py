"""
The sizes of a graph as formulas of symbols, and their values in one call.

Example: a backward graph has the inputs `s0` (the batch size) and a saved tensor `[7*s0, 16]`. Then
`symbol_places([s0, saved])` is `{s0: (0, None)}`: the first input is the value of s0 itself. In a call with 6 samples,
`evaluate(7*s0, {s0: 6})` is 42; for 3 kept rows, `evaluate(7*s0, {s0: 3})` is 21.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import sympy
from torch import SymInt, Tensor

from hf_trim.backward._compile_internals import size_assumptions, size_expression
from hf_trim.backward.compiled.errors import GraphRefusedError
from hf_trim.backward.eager.tensor import Rows


MAX_PADDING = 16  # rows at most by which a number of kept rows is rounded up to one that the graph was compiled for

Values = Mapping[sympy.Symbol, int]


def symbol_places(inputs: list) -> dict[sympy.Symbol, tuple[int, int | None]]:
    """
    Args:
        inputs (`list`): Traced inputs of a graph: tensors with symbolic shapes, sizes, and other values.

    Returns:
        `dict[sympy.Symbol, tuple[int, int | None]]`: Where the value of each symbol can be read: the position of an
        input, and the dimension if that input is a tensor.
    """
    places: dict[sympy.Symbol, tuple[int, int | None]] = {}
    for position, value in enumerate(inputs):
        sizes = enumerate(value.shape) if isinstance(value, Tensor) else [(None, value)]
        for dim, size in sizes:
            if isinstance(size, SymInt) and isinstance(size_expression(size), sympy.Symbol):
                places.setdefault(size_expression(size), (position, dim))
    return places


def evaluate(size: sympy.Expr, values: Values) -> int:
    """
    Args:
        size (`sympy.Expr`): A size as a formula of symbols.
        values (`dict[sympy.Symbol, int]`): The values of symbols.

    Returns:
        `int`: The size.

    Raises:
        [`~hf_trim.backward.compiled.errors.GraphRefusedError`]: If the value of a symbol is missing.
    """
    number = size.xreplace({symbol: sympy.Integer(value) for symbol, value in values.items()})
    if not number.is_Integer:
        raise GraphRefusedError(f"the value of one of its sizes is not known: {size}")
    return int(number)


def smallest_allowed_count(inputs: list, batch: sympy.Symbol, values: Values, rows: Rows) -> int:
    """
    The smallest number of rows, at least the kept ones, for which all conditions of the graph on its sizes hold.

    Example: torch.compile makes no graph for one sample and all larger batches together. So one kept row of 6 runs as
    2 rows, the second of which has a gradient of zero.

    Args:
        inputs (`list`): Traced inputs of the graph.
        batch (`sympy.Symbol`): The batch size.
        values (`dict[sympy.Symbol, int]`): The values of all symbols in this call.
        rows ([`~hf_trim.backward.eager.rows.Rows`]): The kept rows.

    Raises:
        [`~hf_trim.backward.compiled.errors.GraphRefusedError`]: If there is none.
    """
    conditions, least = size_assumptions(next(_symbolic_sizes(inputs)), batch)
    for count in range(max(2, least, rows.count), min(rows.count + MAX_PADDING, rows.batch) + 1):
        numbers = {symbol: sympy.Integer(value) for symbol, value in {**values, batch: count}.items()}
        if all(condition.xreplace(numbers) == sympy.true for condition in conditions):
            return count
    raise GraphRefusedError(f"it was compiled for batch sizes that {rows.count} is not one of")


def _symbolic_sizes(inputs: list) -> Iterator[Any]:
    for value in inputs:
        sizes = value.shape if isinstance(value, Tensor) else (value,)
        yield from (size for size in sizes if isinstance(size, SymInt))
