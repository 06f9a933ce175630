"""
Any loss may leave rows out: where the gradient of a row is zero, the backward pass goes on without it.

e.g. hidden states `[B, T, C]`, B = 4, and a loss that clips samples 0 and 2: the gradient that arrives is an ordinary
`[4, T, C]`, zero in rows 0 and 2. It goes on as a `RowSparseTensor` with the payload `[2, T, C]`.
"""

import torch
from torch import Tensor

from hf_trim.backward._torch_internals import is_transforming
from hf_trim.backward.eager.rows import Rows
from hf_trim.backward.eager.sparse import DENSE_ABOVE, needs_ordinary_gradients, prepare_backward, row_gradient
from hf_trim.backward.settings import current_settings


def skip_zero_rows(x: Tensor, dense_above: float = DENSE_ABOVE) -> Tensor:
    """
    The same tensor, whose backward pass skips the rows that have a gradient of zero. It is for losses that leave some
    samples out by themselves: a hinge, a clipped ratio, hard examples, an advantage of zero. All that `x` was computed
    from gets its gradient as usual, at the price of the other rows alone.

    Which rows these are is looked at in the backward pass: one pass over the gradient of `x`, and on a GPU the host
    waits for it. Nothing more is done where few rows are zero. A NaN is not zero, and zero times an infinity that the
    forward pass left in a skipped row counts as zero, where PyTorch has NaN.

    ```python
    scores = skip_zero_rows(model(images))
    F.multi_margin_loss(scores, labels).backward()  # costs what the samples inside the margin cost
    ```

    Args:
        x (`torch.Tensor`):
            `[B, ...]`, behind the part of the model that costs time, where all parts of the loss have met. An in-place
            op on the result writes to `x` too, and then nothing is skipped: let it write to a copy (`clone`).
        dense_above (`float`, *optional*, defaults to 0.8): Share of other rows above which the backward pass is dense.

    Returns:
        `torch.Tensor`: A view of `x`, or `x` itself where there is no backward pass to shorten: without a graph, while
        `torch.compile` traces the call, and in transforms of `torch.func`. (A compiled model that `x` comes from is
        another thing: its graph runs on the other rows, see `compiled/`.)

    Raises:
        `ValueError`: If `x` has no dimension.
    """
    if x.ndim == 0:
        raise ValueError("Expected a tensor [B, ...] with rows to skip, got a scalar: call it before a mean is taken.")
    if torch.compiler.is_compiling() or is_transforming() or x.grad_fn is None or not torch.is_grad_enabled():
        return x
    if x.layout is not torch.strided or x.is_nested:
        return x
    node = x.grad_fn
    out = torch.ops.aten.alias(x)  # the gradient passes it as it is, whatever its layout

    def skip(grads: tuple, _: tuple) -> tuple | None:
        grad = grads[0]
        if not _has_readable_rows(grad) or needs_ordinary_gradients(grad):
            return None
        kept = (grad if grad.ndim == 1 else grad.any(dim=tuple(range(1, grad.ndim)))).nonzero().flatten()
        if not kept.numel():
            kept = kept.new_zeros(1)  # one row of zeros: there are no tensors without rows
        if kept.numel() > dense_above * len(grad):
            return None
        rows = Rows(kept, len(grad), may_be_run=not current_settings().tape)
        prepare_backward([node], rows)
        return (row_gradient(grad.index_select(0, kept), rows),)

    # A hook of the node, not of a tensor: what other hooks make of the gradient of `out` comes first. The hook holds
    # the node behind its own, so that there is no cycle.
    assert out.grad_fn is not None
    out.grad_fn.register_hook(skip)
    return out


def _has_readable_rows(grad: Tensor | None) -> bool:
    """Whether the host may look at a gradient: it is an ordinary tensor with values, and no CUDA graph is recorded."""
    if type(grad) is not Tensor or grad.layout is not torch.strided or grad.is_meta:
        return False
    return not (grad.is_cuda and torch.cuda.is_current_stream_capturing())
