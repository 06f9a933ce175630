"""
Some formulas of the backward pass compute with a saved tensor before they use the gradient. The gradient of x³ is
3x²·grad, and autograd would square all of x. The nodes of such formulas get the kept rows of what they saved instead,
as [`~hf_trim.backward.eager.activation.ActivationRows`], and the rules of forward ops square these only.

e.g. x is `[B, T, C]`, B = 4, rows 1 and 3 kept: the node of `x**3` unpacks `ActivationRows` with the payload
`[2, T, C]`, and squares that.
"""

from torch import Size, Tensor
from torch.autograd.graph import Node

from hf_trim.backward._torch_internals import has_no_hooks, saved_tensors, saved_value, version_of
from hf_trim.backward.eager.activation import ActivationRows
from hf_trim.backward.eager.tensor import RowSparseTensor


# Nodes of elementwise formulas that compute with a saved tensor alone.
COMPUTE_WITH_SAVED = {
    f"{name}Backward{number}"
    for name in (
        "Abs", "Acos", "Asin", "Asinh", "Atan", "Clamp", "ClampMax", "ClampMin", "Cos", "Cosh", "Div", "Erf", "Erfc",
        "Expm1", "Log1P", "Log2", "Log10", "Pow", "Reciprocal", "Rsqrt", "Sin", "Sinh", "Sqrt", "Tan", "Xlogy",
    )
    for number in (0, 1)
}  # fmt: skip
MIN_ELEMENTS = 1 << 14  # smaller tensors are computed faster than they are sliced


def keep_rows_of_saved(node: Node) -> None:
    """
    Lets a node whose formula is one of [`COMPUTE_WITH_SAVED`] compute with the kept rows of its gradient only.

    Args:
        node (`torch.autograd.graph.Node`): The node. What it saved with hooks, or in another shape than that of its
            gradient, stays as it is.
    """
    shape: Size | None = None  # of the gradient, if it has rows
    layout: tuple = ()

    def prehook(grads):
        nonlocal shape, layout
        (grad,) = grads
        shape, layout = (grad.shape, grad.layout_of_rows()) if isinstance(grad, RowSparseTensor) else (None, ())

    def pack(x: Tensor):
        return x, version_of(x)

    def unpack(packed) -> Tensor:
        x, version = packed
        if version_of(x) != version:  # autograd checks this only where there are no hooks
            raise RuntimeError(
                f"A tensor {list(x.shape)} needed by a backward pass was changed by an in-place operation."
            )
        if x.shape != shape:
            return x
        rows, *dims = layout
        out = ActivationRows(rows.take(x, *dims), rows, *dims)
        out.materialize = lambda: x
        return out

    hooked = False
    for name, saved in saved_tensors(node):
        if not has_no_hooks(saved):
            continue
        try:
            x = saved_value(node, name)
        except RuntimeError:  # freed, or changed in place: autograd will say so
            continue
        if isinstance(x, Tensor) and x.numel() >= MIN_ELEMENTS:
            saved.register_hooks(pack, unpack)
            hooked = True
    if hooked:
        node.register_prehook(prehook)
