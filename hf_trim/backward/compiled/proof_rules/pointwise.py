"""
The proof rule of pointwise ops.

Example: `mul(grad, x)` of a gradient `[s0*5, 16]`, zero outside of the kept rows, and a saved tensor `[s0*5, 16]` has
its rows where both have them, in dimension 0 with inner 5, and is zero where one of them is. `add(grad, bias)` with a
bias `[16]` has the same rows, but may be nonzero anywhere. `add(a, b)` of `[s0, 1]` and `[s0]` is refused: its result
is `[s0, s0]`, in which each row meets each row.
"""

from typing import TYPE_CHECKING, cast

from hf_trim.backward.compiled.errors import RowsMixedError
from hf_trim.backward.compiled.values import Value, Zeros, values_in, zeros_of
from hf_trim.backward.registry import PROOF, implements


if TYPE_CHECKING:
    from hf_trim.backward.compiled.proof import Propagation


_ZERO_WHERE_FIRST_IS = {
    "_to_copy", "abs", "alias", "asinh", "atan", "ceil", "clone", "convert_element_type", "detach", "div", "erf",
    "expm1", "floor", "lift_fresh_copy", "neg", "relu", "round", "sign", "sin", "sinh", "sqrt", "tan", "tanh",
    "trunc",
}  # fmt: skip


def _zeros_of_result(name: str, args: tuple) -> Zeros:
    zeros = [zeros_of(x) for x in args]
    if name in ("mul", "logical_and", "bitwise_and"):
        return max(zeros[:2])
    if name in ("add", "sub", "rsub", "maximum", "minimum", "logical_or", "bitwise_or"):
        return min(zeros[:2])
    if name == "where":
        return min(zeros[1:])
    if name == "masked_fill":
        return min(zeros[0], zeros[2])
    if name == "fma":
        return min(max(zeros[:2]), zeros[2])
    if name == "addcmul":
        return min(zeros[0], max(zeros[1:3]))
    if name == "addcdiv":
        return min(zeros[:2])
    if name == "threshold":
        return zeros[0] if args[2] == 0 else Zeros.UNKNOWN
    if name == "pow":
        return zeros[0] if isinstance(args[1], (int, float)) and args[1] > 0 else Zeros.UNKNOWN
    if name in _ZERO_WHERE_FIRST_IS or name.endswith("_backward"):
        return zeros[0]
    return Zeros.UNKNOWN


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
    zeros = _zeros_of_result(name, args)
    if zeros == Zeros.EVERYWHERE:  # whatever the other operands are
        return prop.uniform_result(shape, Zeros.EVERYWHERE)
    values = list(values_in((args, kwargs)))
    for value in values:
        if value.unknown:
            raise RowsMixedError(value.unknown)
    prop.check_no_batch_size(args, kwargs)
    carriers = [value for value in values if value.dim is not None]
    if not carriers:
        return prop.result(shape, zeros=zeros)
    # Counted from the end, as in broadcasting.
    dims = {cast(int, value.dim) - len(value.shape) for value in carriers}
    if len(dims) > 1:
        raise RowsMixedError("its operands carry rows in different dimensions")
    is_row_index = len(values) == 1 and values[0].is_row_index and name in ("clone", "alias", "detach")
    return prop.result(shape, dims.pop() + len(shape), prop.common_layout(carriers), zeros, is_row_index)


@implements("native_dropout_backward", table=PROOF)
def _dropout_backward(prop, name, shape, grad, mask, scale):
    return pointwise(prop, "mul", shape, grad, mask)


# These have no tag in some versions of PyTorch that says they are pointwise.
implements("clone", "alias", "detach", "_to_copy", "convert_element_type", "fma", table=PROOF)(pointwise)
