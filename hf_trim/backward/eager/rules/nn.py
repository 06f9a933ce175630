"""
Convolution and recurrent layers. The rules of other layers follow from the facts, and convolution's but for two
things: kernels that each sample has of its own, and a memory layout that is slow.
"""

import torch

from hf_trim.backward.eager.rules.derived import derived_rule, run_on_batch
from hf_trim.backward.eager.rules.operands import find_reference, is_zeros, require_row_sparse
from hf_trim.backward.eager.tensor import RowSparseTensor
from hf_trim.backward.facts import FACTS
from hf_trim.backward.registry import implements, require


_convolution_backward = derived_rule(FACTS["convolution_backward"])


def convolution_with_own_kernels(func, grad, x, weight, bias_sizes, *args):
    """Each sample has kernels of its own: `[1, B·C, ...]` in a multiple of `B` groups, with weights `[B·O, ...]`."""
    *options, groups, output_mask = args
    batch = grad.rows.batch
    require(grad.row_outer == 1 and len(grad) == 1 and groups % batch == 0, "rows are not samples")
    kept_bias, kept_groups = bias_sizes and [grad.payload.shape[1]], groups // batch * grad.rows.count
    inner, own = x.shape[1] // batch, len(weight) // batch
    kept = grad.payload, grad.kept_rows(x, 1, inner), grad.kept_rows(weight, 0, own)
    outs = func(*kept, kept_bias, *options, kept_groups, output_mask)
    layouts = (1, 1, inner), (0, 1, own), (0, 1, grad.row_inner)
    return tuple(x if x is None else type(grad)(x, grad.rows, *at) for x, at in zip(outs, layouts, strict=True))


@implements("convolution_backward")
def convolution_backward(func, grad, x, weight, bias_sizes, *args):
    # [B, C, ...]; a convolution without a batch dimension has been given one of size 1.
    if require_row_sparse(grad).row_dim == 1:
        return convolution_with_own_kernels(func, grad, x, weight, bias_sizes, *args)
    if x.device.type == "cpu" and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        grad = grad.like(grad.payload.contiguous(memory_format=torch.channels_last))  # oneDNN is slow on mixed layouts
    return _convolution_backward(func, grad, x, weight, bias_sizes, *args)


@implements("mkldnn_rnn_layer_backward")
def rnn_layer_backward(
    func, x, w1, w2, w3, w4, hx, cx, out, hy, cy, grad_out, grad_hy, grad_cy, reverse, mode, hidden_size, num_layers,
    has_biases, train, bidirectional, batch_sizes, batch_first, workspace,
):  # fmt: skip
    """The kept rows run forward again: what oneDNN wrote down of all of them cannot be sliced."""
    grads = [grad for grad in (grad_out, grad_hy, grad_cy) if grad is not None]
    require(not batch_sizes and all(map(is_zeros, grads)), "sequences are packed")
    ref = find_reference(grads)
    x, hx, cx, *grads = (ref.kept_rows(y, -2) for y in (x, hx, cx, grad_out, grad_hy, grad_cy))  # [..., B, features]
    layers = mode, hidden_size, num_layers, has_biases
    with torch.enable_grad():  # without, it writes nothing down
        *outs, workspace = torch.ops.aten.mkldnn_rnn_layer(
            x, w1, w2, w3, w4, hx, cx, reverse, batch_sizes, *layers, bidirectional, batch_first, train
        )
    dx, *weights, dhx, dcx = func(
        x, w1, w2, w3, w4, hx, cx, *outs, *grads, reverse, *layers, train, bidirectional, batch_sizes, batch_first,
        workspace,
    )  # fmt: skip
    return ref.like(dx, dx.ndim - 2), *weights, ref.like(dhx, dhx.ndim - 2), ref.like(dcx, dcx.ndim - 2)


@implements("_cudnn_rnn_backward")
def cudnn_rnn_backward(func, *args):
    """cuDNN does the same with all rows: what it wrote down of them cannot be sliced either."""
    batch_first, batch_sizes = args[14], args[18]
    dims = 0 if batch_first else 1, 1, 1  # of x, hx and cx, and of the gradients of out, hy and cy
    grads = [(grad, dim) for grad, dim in zip(args[7:10], dims, strict=True) if grad is not None]
    ref = find_reference(grad for grad, _ in grads)
    layouts = [isinstance(grad, RowSparseTensor) and grad.layout_of_rows() for grad, _ in grads]
    require(not batch_sizes and layouts == [(ref.rows, dim, 1, 1) for _, dim in grads], "sequences are packed")
    return run_on_batch(ref, func, args, {}, dims)
