"""
Two recordings of one graph, with different numbers k of kept rows → a program for any k. Schedules that take k from
the losses need a recording or two then, not one for each k.

The ops on the kept rows are the same for each k, and so are their constants, but for sizes: these count rows. e.g. a
payload `[k·5, 8]` of k samples with 5 tokens is seen as `[k, 5, 8]`: with k = 2 the sizes `[2, 5, 8]` are recorded,
with k = 3 `[3, 5, 8]`. That makes `[(1,), 5, 8]`, where `(1,)` stands for 1·k.
"""

from typing import Any

from hf_trim.backward.tape.recorder import Program


class DifferentError(Exception):
    """Two recordings differ in something else than sizes that are multiples of k."""


def for_any_count(first: Program, second: Program, counts: tuple[int, int]) -> Program | None:
    """
    Args:
        first, second ([`~hf_trim.backward.tape.recorder.Program`]): Recordings of one graph.
        counts (`tuple[int, int]`): The numbers of kept rows that they are for.

    Returns:
        [`~hf_trim.backward.tape.recorder.Program`] or `None`: What holds for any number of kept rows; `None` if the
        recordings differ in more than that.
    """
    if first._replace(ops=[]) != second._replace(ops=[]) or len(first.ops) != len(second.ops):
        return None
    try:
        return first._replace(ops=[_joined_op(a, b, counts) for a, b in zip(first.ops, second.ops, strict=True)])
    except DifferentError:
        return None


def _joined_op(a: tuple, b: tuple, counts: tuple[int, int]) -> tuple:
    (name, overload, args, *places, expected), (*names, other_args, results, frees, other_expected) = a, b
    if [name, overload, *places] != [*names, results, frees]:
        raise DifferentError
    arguments = tuple(_joined_argument(x, y, counts) for x, y in zip(args, other_args, strict=True))
    if isinstance(expected, list) and isinstance(other_expected, list):
        expected = [_joined_result(x, y, counts) for x, y in zip(expected, other_expected, strict=True)]
    elif expected != other_expected:
        raise DifferentError
    return name, overload, arguments, *places, expected


def _joined_argument(a: tuple, b: tuple, counts: tuple[int, int]) -> tuple:
    if _is_same(a, b):
        return a
    if a[0] != "constant" or b[0] != "constant":
        raise DifferentError
    return "counted", _joined(a[1], b[1], counts)


def _joined_result(a: Any, b: Any, counts: tuple[int, int]) -> Any:
    """What a result must be: a number, or for each of its tensors the sizes."""
    if _is_same(a, b):
        return a
    if type(a) is int and type(b) is int:
        return _per_row(a, b, counts)
    if not isinstance(a, list) or not isinstance(b, list) or len(a) != len(b):
        raise DifferentError
    return [_joined(x, y, counts) for x, y in zip(a, b, strict=True)]


def _joined(a: Any, b: Any, counts: tuple[int, int]) -> list:
    """Sizes, of which some are multiples of k, or one of them."""
    x, y = (list(sizes) if isinstance(sizes, (list, tuple)) else [sizes] for sizes in (a, b))
    if isinstance(a, int) != isinstance(b, int) or len(x) != len(y) or {type(n) for n in (*x, *y)} != {int}:
        raise DifferentError
    return [n if n == m else _per_row(n, m, counts) for n, m in zip(x, y, strict=True)]


def _per_row(n: int, m: int, counts: tuple[int, int]) -> tuple[int]:
    if n % counts[0] or m % counts[1] or n // counts[0] != m // counts[1]:
        raise DifferentError
    return (n // counts[0],)


def _is_same(a: Any, b: Any) -> bool:
    """Whether two constants are equal, and of one type: 1 is neither 1.0 nor true."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_is_same, a, b))
    return type(a) is type(b) and bool(a == b)
