"""
The proof rule of pointwise ops.

Example: `mul(grad, x)` of a gradient `[s0*5, 16]`, zero outside of the kept rows, and a saved tensor `[s0*5, 16]` has
its rows where both have them, in dimension 0 with inner 5, and is zero where one of them is. `add(grad, bias)` with a
bias `[16]` has the same rows, but may be nonzero anywhere. `add(a, b)` of `[s0, 1]` and `[s0]` is refused: its result
is `[s0, s0]`, in which each row meets each row.
"""

from typing import TYPE_CHECKING, cast

from torch import SymBool, SymFloat, SymInt

from hf_trim.backward._torch_internals import tree_iter
from hf_trim.backward.compiled.values import Value, Zeros, check_same_dim, values_in, zeros_of
from hf_trim.backward.facts.pointwise import keeps_zeros, zero_where
from hf_trim.backward.registry import NotRowwiseError


if TYPE_CHECKING:
    from hf_trim.backward.compiled.proof import Propagation


def _zeros_of_result(prop: "Propagation", name: str, args: tuple, kwargs: dict) -> Zeros:
    terms = zero_where(name)
    if terms is not None:
        return min(max(zeros_of(args[i]) for i in term) for term in terms)
    zeros = min((zeros_of(x) for x in values_in((args, kwargs))), default=Zeros.UNKNOWN)
    has_symbols = any(isinstance(x, (SymInt, SymFloat, SymBool)) for x in tree_iter((args, kwargs)))
    if zeros == Zeros.UNKNOWN or has_symbols or not keeps_zeros(prop.op, args, kwargs, Value):
        return Zeros.UNKNOWN
    return zeros


def pointwise(prop: "Propagation", name: str, shape: tuple, *args, **kwargs) -> Value:
    """
    The rule of all pointwise ops, and of ops that behave like one.

    Args:
        prop ([`~hf_trim.backward.compiled.proof.Propagation`]): The pass through the graph.
        name (`str`): Name of the op; what is known of its zeros goes by it.
        shape (`tuple[sympy.Expr, ...]`): The shape of the result.
        args, kwargs (`Any`): The arguments of the op.

    Returns:
        [`~hf_trim.backward.compiled.values.Value`]: The result.
    """
    zeros = _zeros_of_result(prop, name, args, kwargs)
    if zeros == Zeros.EVERYWHERE:  # whatever the other operands are
        return prop.uniform_result(shape, Zeros.EVERYWHERE)
    values = list(values_in((args, kwargs)))
    for value in values:
        if value.unknown:
            raise NotRowwiseError(value.unknown)
    prop.check_no_batch_size(args, kwargs)
    carriers = [value for value in values if value.row_dim is not None]
    if not carriers:
        return prop.result(shape, zeros=zeros)
    # Counted from the end, as in broadcasting.
    dims = [cast(int, value.row_dim) - value.ndim for value in carriers]
    check_same_dim(dims)
    is_row_index = len(values) == 1 and values[0].is_row_index and name == "clone"
    return prop.result(shape, dims[0] + len(shape), prop.common_layout(carriers), zeros, is_row_index)
