"""
Stand-ins on the CPU for the attention kernels of CUDA. Like these they draw their dropout masks by a sample's place in
the batch, so that a slice of the batch would get others; they read what the forward pass wrote down. What they return
has the shapes and strides that `torch.compile` expects of the kernels.
"""

import math

import torch
import torch.nn.functional as F


aten = torch.ops.aten
KERNELS = ("flash", "efficient", "cudnn")


def attend(kernel, q, k, v, bias=None, dropout_p=0.0):
    """Attention of `[B, H, T, D]` with one of the kernels."""
    if kernel == "flash":
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0]
    op = {"efficient": aten._scaled_dot_product_efficient_attention, "cudnn": aten._scaled_dot_product_cudnn_attention}
    return op[kernel](q, k, v, bias, True, dropout_p)[0]


def _scores(q, k, bias):
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return scores if bias is None else scores + bias


def _masks(seed, shape, dropout_p):
    """The masks of all samples, one after the other."""
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(int(seed)), dtype=torch.double)
    return (drawn >= dropout_p) / (1 - dropout_p)


def _forward(q, k, v, bias, dropout_p):
    scores, seed = _scores(q, k, bias), torch.randint(1 << 30, ())
    logsumexp = scores.logsumexp(-1)
    probabilities = (scores - logsumexp[..., None]).exp() * _masks(seed, scores.shape, dropout_p).to(q.dtype)
    return probabilities @ v, logsumexp, seed


def _backward(grad, q, k, v, bias, out, logsumexp, seed, dropout_p):
    probabilities = (_scores(q, k, bias) - logsumexp[..., None]).exp()
    masks = _masks(seed, probabilities.shape, dropout_p).to(q.dtype)
    of_scores = probabilities * (grad @ v.mT * masks - (grad * out).sum(-1, keepdim=True))
    scale = math.sqrt(q.shape[-1])
    return of_scores @ k / scale, of_scores.mT @ q / scale, (probabilities * masks).mT @ grad, of_scores


def _like(x, other):
    return torch.empty_like(other).copy_(x)


def _heads_inside(x):
    """`[B, H, T, D]` as `[B, T, H, D]` in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    out, logsumexp, seed = _forward(q, k, v, None, dropout_p)
    seed, offset = seed.expand(2).to(torch.uint64), torch.zeros((), dtype=torch.uint64)
    return _like(out, q), logsumexp, None, None, q.shape[2], k.shape[2], seed, offset, q.new_empty(0)


def _flash_backward(
    grad, q, k, v, out, logsumexp, ends_q, ends_k, max_q, max_k, dropout_p, is_causal, seed, offset, *, scale=None
):
    grads = _backward(grad, q, k, v, None, out, logsumexp, seed[0], dropout_p)
    return tuple(map(_like, grads, (q, k, v)))


def _efficient(q, k, v, bias, compute_logsumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    out, logsumexp, seed = _forward(q, k, v, bias, dropout_p)
    return _heads_inside(out), F.pad(logsumexp, (0, -q.shape[2] % 32)), seed, seed.clone()


def _efficient_backward(
    grad, q, k, v, bias, out, logsumexp, seed, offset, dropout_p, wanted, is_causal=False, *, scale=None
):
    logsumexp = logsumexp[..., : q.shape[2]]
    *grads, of_bias = _backward(grad, q, k, v, bias, out, logsumexp, seed, dropout_p)
    padded = F.pad(of_bias, (0, -of_bias.shape[-1] % 16))[..., : of_bias.shape[-1]]
    return *map(_heads_inside, grads), padded if wanted[3] else None


def _cudnn(q, k, v, bias, compute_logsumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    out, logsumexp, seed = _forward(q, k, v, bias, dropout_p)
    return _like(out, q), logsumexp[..., None], None, None, q.shape[2], k.shape[2], seed, seed.clone(), None


def _cudnn_backward(
    grad,
    q,
    k,
    v,
    out,
    logsumexp,
    seed,
    offset,
    bias,
    ends_q,
    ends_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    *,
    scale=None,
):
    grads = _backward(grad, q, k, v, bias, out, logsumexp[..., 0], seed, dropout_p)
    return tuple(map(_like, grads, (q, k, v)))


def register(library):
    """Registers the stand-ins in a `torch.library.Library` of ATen's."""
    for name, forward, backward in (
        ("flash", _flash, _flash_backward),
        ("efficient", _efficient, _efficient_backward),
        ("cudnn", _cudnn, _cudnn_backward),
    ):
        library.impl(f"_scaled_dot_product_{name}_attention", forward, "CPU")
        library.impl(f"_scaled_dot_product_{name}_attention_backward", backward, "CPU")
