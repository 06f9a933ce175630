"""
Some formulas of the backward pass compute with a saved tensor before they use the gradient. The gradient of x³ is
3x²·grad, and autograd would square all of x. The nodes of such formulas get the kept rows of what they saved instead,
as [`~hf_trim.backward.eager.activation.ActivationRows`], and the rules of forward ops square these only.

e.g. x is `[B, T, C]`, B = 4, rows 1 and 3 kept: the node of `x**3` unpacks `ActivationRows` with the payload
`[2, T, C]`, and squares that.
"""

from torch import Tensor
from torch.autograd.graph import Node

from hf_trim.backward._torch_internals import has_no_hooks, saved_tensors, saved_value, version_of
from hf_trim.backward.eager.activation import ActivationRows
from hf_trim.backward.eager.tensor import RowSparseTensor


# Nodes of formulas that compute with a saved tensor alone.
COMPUTE_WITH_SAVED = {
    f"{name}Backward{number}"
    for name in (
        "Abs", "Acos", "Asin", "Asinh", "Atan", "Clamp", "ClampMax", "ClampMin", "Cos", "Cosh", "Div", "Erf", "Erfc",
        "Expm1", "LinalgVectorNorm", "Log1P", "Log2", "Log10", "Pow", "Reciprocal", "Rsqrt", "Sin", "Sinh", "Sqrt",
        "Std", "StdMean", "Tan", "Var", "VarMean", "Xlogy",
    )
    for number in (0, 1)
}  # fmt: skip
MIN_ELEMENTS = 1 << 14  # smaller tensors are computed faster than they are sliced


def keep_rows_of_saved(node: Node) -> None:
    """
    Lets a node whose formula is one of [`COMPUTE_WITH_SAVED`], or written in Python, compute with the kept rows of its
    gradient only.

    Args:
        node (`torch.autograd.graph.Node`): The node. What it saved with hooks, or without the rows of its gradient in
            the same dimension, stays as it is.
    """
    # Of the gradient, if it has rows: number of dimensions, size along the rows, and where they are.
    ndim, size, layout = -1, 0, None

    def prehook(grads):
        nonlocal ndim, size, layout
        ndim = -1
        for grad in grads:
            if isinstance(grad, RowSparseTensor):
                ndim, size, layout = grad.ndim, grad.shape[grad.row_dim], grad.layout_of_rows()

    def pack(x: Tensor):
        return x, version_of(x)

    def unpack(packed):
        x, version = packed
        if version_of(x) != version:  # autograd checks this only where there are no hooks
            raise RuntimeError(
                f"A tensor {list(x.shape)} needed by a backward pass was changed by an in-place operation."
            )
        if x.ndim != ndim or x.shape[layout[1]] != size:
            return x
        rows, *dims = layout
        out = ActivationRows(rows.take(x, *dims), rows, *dims)
        out.materialize = lambda: x
        return out

    hooked = False
    for name, saved in saved_tensors(node):
        handles = saved if isinstance(saved, tuple) else (saved,)
        if not all(map(has_no_hooks, handles)):
            continue
        try:
            values = saved_value(node, name)
        except RuntimeError:  # freed, or changed in place: autograd will say so
            continue
        for handle, x in zip(handles, values if isinstance(values, tuple) else (values,), strict=True):
            if isinstance(x, Tensor) and x.numel() >= MIN_ELEMENTS:
                handle.register_hooks(pack, unpack)
                hooked = True
    if hooked:
        node.register_prehook(prehook)
