"""
Elementwise ops: which these are, and where their results are zero.

e.g. `mul` is zero where one of its operands is, `where(c, x, y)` where both x and y are, and `sin` where x is, as a
look at `sin(0)` says. `cos` need not be zero anywhere.
"""

import torch

from hf_trim.backward._torch_internals import OpOverload, is_torch_op, op_name


# Ops that are elementwise without having the tag, in some versions of PyTorch.
POINTWISE = {
    "_conj", "_neg_view", "_to_copy", "clone", "convert_element_type", "elu_backward", "fma", "hardsigmoid_backward",
    "hardswish_backward", "hardtanh_backward", "leaky_relu_backward", "lift_fresh_copy", "log_sigmoid_backward",
    "mish_backward", "rrelu_with_noise_backward", "softplus_backward",
}  # fmt: skip

FIRST = ((0,),)
# Op → terms. The result is zero where all terms are, and a term where one of these operands is.
ZERO_WHERE: dict[str, tuple[tuple[int, ...], ...]] = {
    "mul": ((0, 1),), "add": ((0,), (1,)), "sub": ((0,), (1,)), "where": ((1,), (2,)), "masked_fill": ((0,), (2,)),
    "addcmul": ((0,), (1, 2)), "addcdiv": ((0,), (1,)), "fma": ((0, 1), (2,)),
    **dict.fromkeys(("_to_copy", "clone", "convert_element_type", "div", "ldexp", "lift_fresh_copy", "xlogy"), FIRST),
}  # fmt: skip

_of_zeros: dict[tuple, bool] = {}  # op and arguments → whether the op makes zero of zeros


def is_pointwise(op: OpOverload) -> bool:
    """Whether an op is elementwise, by its tags or by name."""
    return torch.Tag.pointwise in op.tags or (is_torch_op(op) and op_name(op) in POINTWISE)


def zero_where(name: str) -> tuple[tuple[int, ...], ...] | None:
    """The terms of an op's result, as in `ZERO_WHERE`; `None` if [`keeps_zeros`] is to be asked."""
    return FIRST if name.endswith("_backward") else ZERO_WHERE.get(name)  # linear in the incoming gradient


def keeps_zeros(op: OpOverload, args: tuple, kwargs: dict, kind: type) -> bool:
    """
    Whether an elementwise op makes zero of zeros: it is run once, to see.

    Args:
        op (`OpOverload`): The op.
        args (`tuple`): Its arguments: operands that are zero, and numbers.
        kwargs (`dict`): Those by keyword.
        kind (`type`): The type of the operands.
    """
    key = (op, repr([kind if isinstance(x, kind) else x for x in args]), repr(kwargs))
    if key not in _of_zeros:
        zeros = [torch.zeros((), dtype=getattr(x, "dtype", None)) if isinstance(x, kind) else x for x in args]
        try:
            _of_zeros[key] = op(*zeros, **kwargs).item() == 0
        except RuntimeError:  # it is for other dtypes, say
            _of_zeros[key] = False
    return _of_zeros[key]
