"""
Convolution. The rules of other layers follow from the facts, and this one's but for two things: kernels that
each sample has of its own, and a memory layout that is slow.
"""

import torch

from hf_trim.backward.eager.rules.derived import derived_rule
from hf_trim.backward.eager.rules.operands import require_row_sparse
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
