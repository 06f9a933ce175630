"""
Some formulas of the backward pass compute with what was saved before they meet the gradient: that of x³ is 3x²·grad.
The square would be one of the whole batch. The nodes of such formulas get the kept rows of what they saved instead, as
[`~hf_trim.backward.eager.tensor.ActivationRows`]; the forward rules do the rest.
"""

from torch import Tensor

from hf_trim.backward.eager.tensor import ActivationRows, RowSparseTensor


# Elementwise ones.
COMPUTES_FIRST = {
    f"{name}Backward{number}"
    for name in (
        "Abs", "Acos", "Asin", "Asinh", "Atan", "Clamp", "ClampMax", "ClampMin", "Cos", "Cosh", "Div", "Erf", "Erfc",
        "Expm1", "Log1P", "Log2", "Log10", "Pow", "Reciprocal", "Rsqrt", "Sin", "Sinh", "Sqrt", "Tan", "Xlogy",
    )
    for number in (0, 1)
}  # fmt: skip
WORTH_IT = 1 << 14  # elements: smaller ones are computed faster than they are sliced
_names: dict[type, list[str]] = {}


def saved_names(node) -> list[str]:
    """The attributes of a node that hold what it saved, as `SavedTensor` or tuples of them."""
    kind = type(node)
    if kind not in _names:
        _names[kind] = [name for name in dir(kind) if name.startswith("_raw_saved_")]
    return _names[kind]


def keep_rows_of_saved(node) -> None:
    """
    Lets a node whose formula is one of [`COMPUTES_FIRST`] compute with the kept rows of its gradient only.

    Args:
        node (`torch.autograd.graph.Node`): The node. What it saved with hooks, or in another shape than that of its
            gradient, stays as it is.
    """
    shape, layout = None, ()  # of the gradient, if it has rows

    def prehook(grads):
        nonlocal shape, layout
        (grad,) = grads
        shape, layout = (grad.shape, grad.layout_of_rows()) if isinstance(grad, RowSparseTensor) else (None, ())

    def pack(x: Tensor):
        return x, x._version

    def unpack(packed) -> Tensor:
        x, version = packed
        if x._version != version:  # autograd checks this only where there are no hooks
            raise RuntimeError(
                f"A tensor {list(x.shape)} needed by a backward pass was changed by an in-place operation."
            )
        if x.shape != shape:
            return x
        rows, *where = layout
        out = ActivationRows(rows.take(x, *where), rows, *where)
        out.whole = lambda: x
        return out

    hooked = False
    for name in saved_names(node):
        saved = getattr(node, name)
        if getattr(saved, "unpack_hook", True) is not None:  # where PyTorch can't tell, there might be one
            continue
        try:
            x = getattr(node, name.replace("_raw", "", 1))
        except RuntimeError:  # freed, or changed in place: autograd will say so
            continue
        if isinstance(x, Tensor) and x.numel() >= WORTH_IT:
            saved.register_hooks(pack, unpack)
            hooked = True
    if hooked:
        node.register_prehook(prehook)
