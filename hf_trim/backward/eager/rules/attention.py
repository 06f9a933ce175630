"""
Backward ops of the fused attention kernels.

Kernels that apply dropout themselves draw the mask by a sample's place in the batch, so that a slice of the batch
would get another mask. With dropout inside the kernel these ops run dense.

e.g. operands `[B, H, T, D]`, B = 4, rows 1 and 3 kept: the kernel runs on the payload `[2, H, T, D]` and the kept rows
of query, key, value, output and `logsumexp` (`[B, H, T]`), and its three gradients are row-sparse.
"""

from hf_trim.backward.eager.rules.operands import require, require_row_sparse, require_samples, wrap_outputs
from hf_trim.backward.registry import implements


def _kept_samples(grad, *tensors):
    require_samples(require_row_sparse(grad))
    require(grad.ndim == 4, "rows are not samples")
    return [grad.kept_rows(x, 0) for x in tensors]


def _mask(grad, mask):
    """A mask or bias of batch size 1, or without a batch dimension, serves every sample."""
    return None if mask is None else grad.kept_rows_or_broadcast(mask, -4)


@implements("_scaled_dot_product_flash_attention_for_cpu_backward")
def flash_cpu(func, grad, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None):
    require(dropout_p == 0, "dropout inside the kernel")
    kept = _kept_samples(grad, grad, query, key, value, out, logsumexp)
    return wrap_outputs(grad, func(*kept, dropout_p, is_causal, attn_mask=_mask(grad, attn_mask), scale=scale))


@implements("_scaled_dot_product_flash_attention_backward")
def flash(
    func, grad, query, key, value, out, logsumexp, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset,
    *, scale=None,
):  # fmt: skip
    require(dropout_p == 0, "dropout inside the kernel")
    require(cum_q is None and cum_k is None, "sequences are packed")
    kept = _kept_samples(grad, grad, query, key, value, out, logsumexp)
    return wrap_outputs(grad, func(*kept, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset, scale=scale))


@implements("_scaled_dot_product_efficient_attention_backward")
def efficient(
    func, grad, query, key, value, bias, out, logsumexp, seed, offset, dropout_p, grad_input_mask, is_causal=False,
    *, scale=None,
):  # fmt: skip
    require(dropout_p == 0, "dropout inside the kernel")
    require(not grad_input_mask[3], "the bias wants a gradient")
    *inputs, out, logsumexp = _kept_samples(grad, grad, query, key, value, out, logsumexp)
    options = (seed, offset, dropout_p, grad_input_mask, is_causal)
    outs = func(*inputs, _mask(grad, bias), out, logsumexp, *options, scale=scale)
    return *wrap_outputs(grad, outs[:3]), outs[3]


@implements("_scaled_dot_product_cudnn_attention_backward")
def cudnn(
    func, grad, query, key, value, out, logsumexp, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout_p,
    is_causal, *, scale=None,
):  # fmt: skip
    require(dropout_p == 0, "dropout inside the kernel")
    require(cum_q is None and cum_k is None, "sequences are packed")
    kept = _kept_samples(grad, grad, query, key, value, out, logsumexp)
    options = (cum_q, cum_k, max_q, max_k, dropout_p, is_causal)
    return wrap_outputs(grad, func(*kept, seed, offset, _mask(grad, bias), *options, scale=scale))
