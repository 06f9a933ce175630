"""
Small functions of every kind of op, and their gradients with a part of the rows kept beside those of dense autograd.

e.g. "linear": x is [B, T, C], B from 2 to 7, any rows kept; the gradients of x and of the weights are compared.
"""

from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from hf_trim.backward.eager.rows import Rows
from hf_trim.backward.eager.sparse import take_rows_sparse
from hf_trim.backward.eager.tensor import densify
from hf_trim.backward.settings import reset_fallbacks
from hf_trim.backward.waiting import mark_range


KEPT = torch.tensor([1, 4])  # of six rows


@pytest.fixture(scope="module", autouse=True)
def slice_small_tensors():
    """The kept rows of saved tensors are computed with, however small these are. For each module that imports it."""
    with patch("hf_trim.backward.eager.saved.MIN_ELEMENTS", 0):
        yield


@st.composite
def rows(draw):
    batch = draw(st.integers(2, 7))
    kept = draw(st.sets(st.integers(0, batch - 1), min_size=1, max_size=batch))
    return Rows(torch.tensor(sorted(kept)), batch)


def close(a, b):
    torch.testing.assert_close(densify(a), densify(b), rtol=1e-4, atol=1e-5)


# ---- functions of x, [B, T, C]; weights are made inside, with a fixed seed -----------------------------------------


def weight(*shape):
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))))


class Net:
    """Collects the parameters that a case makes, so that their gradients are compared too."""

    def __init__(self):
        self.parameters = []

    def w(self, *shape):
        if len(self.parameters) <= self.count:
            self.parameters.append(weight(*shape))
        self.count += 1
        return self.parameters[self.count - 1]


def image(x):
    return x.unsqueeze(-1) * torch.linspace(-1, 1, 6)  # [B, T, C, 6]


def numbers(x, high, *shape):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(3))


def windows(x, dim):
    """[B, T, C] → [B·3, T, C, 2], or [3·B, T, C, 2] with `dim` 0."""
    return image(x).unflatten(3, (3, 2)).movedim(3, dim).flatten(0, 1)


def experts(n, x):
    tokens = x.flatten(0, 1)
    weights = (tokens @ n.w(x.shape[2], 3)).softmax(-1)
    chosen, out = numbers(x, 3, len(tokens), 2), torch.zeros_like(tokens)
    for expert in chosen.unique():
        token, place = torch.where(chosen == expert)
        out.index_add_(0, token, tokens[token].tanh() @ n.w(x.shape[2], x.shape[2]) * weights[token, place, None])
    return out.view_as(x)


def recurrent(n, x, bidirectional=False):
    """One layer of an LSTM, and the states that it ends with."""
    weights = [n.w(*shape) for _ in range(1 + bidirectional) for shape in ((20, x.shape[2]), (20, 5), (20,), (20,))]
    states = [(x.mean(1) @ n.w(x.shape[2], 5)).expand(1 + bidirectional, -1, -1).sin() for _ in range(2)]
    out, *ends = torch.lstm(x, states, weights, True, 1, 0.0, True, bidirectional, True)
    return out + torch.cat(sum(ends).unbind(), 1)[:, None]


def inplace(x, change):
    y = x * 2
    change(y)
    return y


CASES = {
    # matrix products
    "linear": lambda n, x: F.linear(x, n.w(5, x.shape[2]), n.w(5)),
    "linear_2d": lambda n, x: F.linear(x[:, 0], n.w(5, x.shape[2]), n.w(5)),
    "matmul": lambda n, x: x @ x.transpose(1, 2),
    "matmul_4d": lambda n, x: (w := x.unsqueeze(1) * n.w(3, 1, 1)) @ w.transpose(2, 3),
    "matmul_shared": lambda n, x: n.w(4, x.shape[1]) @ x,
    "matmul_rows_last": lambda n, x: (n.w(4, x.shape[2]) @ x[:, 0].t()).t(),
    "baddbmm": lambda n, x: torch.baddbmm(x @ x.transpose(1, 2), x, x.transpose(1, 2), beta=0.5, alpha=2),
    "addmm": lambda n, x: torch.addmm(n.w(3), x.flatten(1), n.w(x[0].numel(), 3), beta=2, alpha=0.5),
    "einsum": lambda n, x: torch.einsum("btc,cd,bsd->bts", x, n.w(x.shape[2], 3), x @ n.w(x.shape[2], 3)),
    "solve_triangular": lambda n, x: torch.linalg.solve_triangular(
        (x @ x.mT).tril(-1), x, upper=False, unitriangular=True
    ),
    "mv": lambda n, x: x[:, 0] @ n.w(x.shape[2]),
    "time_first": lambda n, x: (x.transpose(0, 1).reshape(-1, x.shape[2]) @ n.w(x.shape[2], 3))
    .view(x.shape[1], -1, 3)
    .transpose(0, 1),
    # pointwise
    **{
        f.__name__: partial(lambda f, n, x: f(x), f)
        for f in (
            torch.tanh, torch.sigmoid, torch.sin, torch.exp, torch.abs, torch.neg, F.relu, F.silu, F.gelu, F.elu,
            F.leaky_relu, F.hardtanh, F.softplus, F.mish, F.hardswish, F.hardsigmoid, F.logsigmoid, F.relu6, F.selu,
        )
    },
    "gelu_tanh": lambda n, x: F.gelu(x, approximate="tanh"),
    "prelu": lambda n, x: F.prelu(x, n.w(x.shape[1])),
    "arithmetic": lambda n, x: (x * n.w(x.shape[2]) + n.w(x.shape[1], 1)) / (x.square() + 1) - x * 3,
    "power": lambda n, x: (x.square() + 1).pow(1.5) + torch.rsqrt(x.square() + 1) + (x.abs() + 1).log().sqrt(),
    "addcmul": lambda n, x: torch.addcmul(x, x, n.w(x.shape[2])) + torch.addcdiv(x, x, x.square() + 1),
    "lerp_clamp": lambda n, x: torch.lerp(x, x.tanh(), 0.3).clamp(-0.5, 0.5),
    "where": lambda n, x: torch.where(x > 0, x * n.w(x.shape[2]), x.sin()),
    "masked_fill": lambda n, x: x.masked_fill(x > 0.5, -1.0),
    "maximum": lambda n, x: torch.maximum(x, n.w(x.shape[2])) + torch.minimum(x, x.flip(1)),
    "dropout": lambda n, x: F.dropout(x, 0.4),
    "cast": lambda n, x: x.double().sin().float(),
    "complex": lambda n, x: torch.view_as_real(torch.view_as_complex(x.unsqueeze(-1).repeat(1, 1, 1, 2))),
    # norms
    "layer_norm": lambda n, x: F.layer_norm(x, x.shape[2:], n.w(x.shape[2]), n.w(x.shape[2])),
    "layer_norm_2d": lambda n, x: F.layer_norm(x, x.shape[1:]),
    "layer_norm_tokens_first": lambda n, x: F.layer_norm(x.transpose(0, 1).contiguous(), x.shape[2:]).transpose(0, 1),
    "group_norm_merged": lambda n, x: F.group_norm(x.repeat_interleave(4, 2).flatten(0, 1), 2).view(*x.shape, 4),
    "rms_norm": lambda n, x: F.rms_norm(x, x.shape[2:], n.w(x.shape[2])),
    "rms_norm_by_hand": lambda n, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * n.w(x.shape[2]),
    "group_norm": lambda n, x: F.group_norm(image(x), x.shape[1], n.w(x.shape[1]), n.w(x.shape[1])),
    "frozen_batch_norm": lambda n, x: F.batch_norm(
        x, torch.zeros(x.shape[1]), torch.ones(x.shape[1]), n.w(x.shape[1]), n.w(x.shape[1])
    ),
    "normalize": lambda n, x: F.normalize(x, dim=-1),
    # softmax and losses
    "softmax": lambda n, x: x.softmax(-1) + x.log_softmax(1),
    "logsumexp": lambda n, x: x.logsumexp(2),
    "glu": lambda n, x: F.glu(torch.cat([x, x.sin()], -1)),
    "cross_entropy": lambda n, x: F.cross_entropy(x[:, 0], numbers(x, x.shape[2], x.shape[0]), reduction="none"),
    "cross_entropy_tokens": lambda n, x: F.cross_entropy(
        x.flatten(0, 1), numbers(x, x.shape[2], x.shape[0] * x.shape[1]), reduction="none", label_smoothing=0.1
    ).view(x.shape[:2]),
    "cross_entropy_2d": lambda n, x: F.cross_entropy(
        image(x), numbers(x, x.shape[1], x.shape[0], x.shape[2], 6), reduction="none"
    ),
    "bce": lambda n, x: F.binary_cross_entropy(x.sigmoid(), torch.full_like(x, 0.3), reduction="none"),
    "bce_with_logits": lambda n, x: F.binary_cross_entropy_with_logits(x, torch.full_like(x, 0.3), reduction="none"),
    "regression_losses": lambda n, x: F.mse_loss(x, x.detach() * 2, reduction="none")
    + F.smooth_l1_loss(x, x.detach() * 2, reduction="none")
    + F.huber_loss(x, x.detach() * 2, reduction="none")
    + F.l1_loss(x, x.detach() * 2, reduction="none"),
    "ctc": lambda n, x: F.ctc_loss(
        (x @ n.w(x.shape[2], 4)).log_softmax(-1).transpose(0, 1), numbers(x, 3, x.shape[0], 2) + 1,
        [x.shape[1]] * x.shape[0], [i % 2 + 1 for i in range(x.shape[0])], reduction="none", zero_infinity=True,
    ),
    "kl_div": lambda n, x: F.kl_div(x.log_softmax(-1), x.detach().softmax(-1), reduction="none"),
    # attention
    "attention": lambda n, x: F.scaled_dot_product_attention(*[(x.unsqueeze(1) * n.w(2, 1, 1)) for _ in range(3)]),
    "attention_causal": lambda n, x: F.scaled_dot_product_attention(*[x.unsqueeze(1) * 2] * 3, is_causal=True),
    "attention_mask": lambda n, x: F.scaled_dot_product_attention(
        *[x.unsqueeze(1) * 2] * 3, attn_mask=torch.randn(x.shape[0], 1, x.shape[1], x.shape[1])
    ),
    "attention_one_mask": lambda n, x: F.scaled_dot_product_attention(
        *[x.unsqueeze(1) * 2] * 3, attn_mask=torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool).tril()
    ),
    "attention_learned_bias": lambda n, x: F.scaled_dot_product_attention(
        *[x.unsqueeze(1) * 2] * 3, attn_mask=n.w(1, 1, x.shape[1], x.shape[1])
    ),
    "attention_dropout": lambda n, x: F.scaled_dot_product_attention(*[x.unsqueeze(1) * 2] * 3, dropout_p=0.5),
    "attention_windows": lambda n, x: F.scaled_dot_product_attention(
        *[windows(x, 1) * n.w(2) for _ in range(3)], attn_mask=torch.randn(x.shape[0] * 3, 1, x.shape[2], x.shape[2])
    ).unflatten(0, (-1, 3)),
    "attention_windows_first": lambda n, x: F.scaled_dot_product_attention(
        *[windows(x, 0) * n.w(2) for _ in range(3)]
    ).unflatten(0, (3, -1))[1],
    "attention_gqa": lambda n, x: F.scaled_dot_product_attention(
        x.unsqueeze(1) * n.w(4, 1, 1), *[x.unsqueeze(1) * n.w(2, 1, 1)] * 2, enable_gqa=True
    ),
    "multi_head": lambda n, x: F.multi_head_attention_forward(
        *[x.transpose(0, 1)] * 3, x.shape[2], 1, n.w(3 * x.shape[2], x.shape[2]), n.w(3 * x.shape[2]), None, None,
        False, 0.0, n.w(x.shape[2], x.shape[2]), n.w(x.shape[2]), need_weights=False,
    )[0].transpose(0, 1),
    # convolution, pooling, resampling
    "conv1d": lambda n, x: F.conv1d(x, n.w(4, x.shape[1], 2), n.w(4), padding=1),
    "conv2d": lambda n, x: F.conv2d(image(x), n.w(4, x.shape[1], 2, 3), n.w(4), stride=(1, 2), padding=1),
    "conv2d_depthwise": lambda n, x: F.conv2d(image(x), n.w(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1]),
    "conv2d_channels_last": lambda n, x: F.conv2d(
        image(x).contiguous(memory_format=torch.channels_last), n.w(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1]
    ),
    "conv2d_kernels_of_samples": lambda n, x: F.conv2d(
        image(x).flatten(0, 1)[None], (x.mean(2) @ n.w(x.shape[1], x.shape[1] * 18)).view(-1, x.shape[1], 3, 3),
        (x.mean(2) @ n.w(x.shape[1], 2)).flatten(), padding=1, groups=x.shape[0],
    ).unflatten(1, (-1, 2))[0],
    "conv_transpose_kernels_of_samples": lambda n, x: F.conv_transpose1d(
        x.flatten(0, 1)[None], (x @ n.w(x.shape[2], 6)).view(-1, 2, 3), groups=x.shape[0], stride=2
    ).unflatten(1, (-1, 2))[0],
    "conv1d_depthwise_kernels_of_samples": lambda n, x: F.conv1d(
        x.flatten(0, 1)[None], (x @ n.w(x.shape[2], 3)).view(-1, 1, 3), padding=1, groups=x.shape[0] * x.shape[1]
    ).view_as(x),
    "conv_transpose": lambda n, x: F.conv_transpose2d(image(x), n.w(x.shape[1], 3, 2, 2), n.w(3), stride=2),
    "max_pool": lambda n, x: F.max_pool2d(image(x), (1, 2)) + F.adaptive_max_pool2d(image(x), (x.shape[2], 3)),
    "avg_pool": lambda n, x: F.avg_pool2d(image(x), (1, 2)) + F.adaptive_avg_pool2d(image(x), (x.shape[2], 3)),
    "global_pool": lambda n, x: F.adaptive_avg_pool2d(image(x).contiguous(memory_format=torch.channels_last), 1),
    "pool_1d": lambda n, x: F.avg_pool1d(x, 2) + F.max_pool1d(x, 2),
    "interpolate": lambda n, x: F.interpolate(image(x), (8, 8))
    + F.interpolate(image(x), (8, 8), mode="bilinear")
    + F.interpolate(image(x), (8, 8), mode="bicubic"),
    "pads": lambda n, x: F.pad(x, (1, 2)) + F.pad(x, (1, 2), mode="reflect") + F.pad(x, (1, 2), mode="replicate"),
    "fold": lambda n, x: F.unfold(image(x), (2, 2)),
    "pixel_shuffle": lambda n, x: F.pixel_shuffle(image(x).repeat(1, 4, 1, 1), 2),
    # embeddings and indexing
    "embedding": lambda n, x: F.embedding(numbers(x, 5, *x.shape[:2]), n.w(5, 3)) * x[..., :1],
    "position_embedding": lambda n, x: F.embedding(torch.arange(x.shape[1])[None], n.w(9, x.shape[2])) + x,
    "select": lambda n, x: x[:, 1] + x.select(1, -1),
    "slice": lambda n, x: x[:, 1:, ::2],
    "fancy_columns": lambda n, x: x[:, torch.tensor([0, 1, 0])],
    "last_token": lambda n, x: x[torch.arange(x.shape[0]), numbers(x, x.shape[1], x.shape[0])],
    "last_token_of_known_rows": lambda n, x: x[
        mark_range((x.shape[0],), {}), numbers(x, x.shape[1], x.shape[0])
    ],
    "range_that_was_changed": lambda n, x: x[mark_range((x.shape[0],), {}).sub_(x.shape[0] - 1).neg_(), 0],
    "shuffled": lambda n, x: x[torch.arange(x.shape[0]).flip(0), 0] + x[:, 1],
    "rows_of_others": lambda n, x: x[numbers(x, x.shape[0], x.shape[0])].sin() * x,
    "rows_of_others_selected": lambda n, x: x.index_select(0, numbers(x, x.shape[0], x.shape[0])).sin() * x,
    "tokens_of_others": lambda n, x: x[numbers(x, x.shape[0], x.shape[0], 1), numbers(x, x.shape[1], x.shape[0], 4)],
    "tokens_in_second_dim": lambda n, x: (
        x.flatten(0, 1)[None][
            :, (torch.arange(x.shape[0])[:, None] * x.shape[1] + numbers(x, x.shape[1], x.shape[0], 4)).flatten()
        ].unflatten(1, (-1, 4))[0]
    ),
    "masked": lambda n, x: torch.zeros_like(x).masked_scatter(x > 0, x[x > 0].sin()),
    "experts": experts,
    "pictures": lambda n, x: torch.zeros_like(x).masked_scatter(
        (torch.arange(x.shape[1]) < 2)[None, :, None], x[:, 1:].repeat(1, 2, 1)[:, :2].flatten(0, 1).sin()
    ),
    "gather": lambda n, x: x.gather(1, numbers(x, x.shape[1], *x.shape)) + x.take_along_dim(x.argsort(-1), -1),
    "index_select": lambda n, x: x.index_select(2, torch.tensor([0, 0, 1])),
    "scatter_add": lambda n, x: torch.zeros_like(x).scatter_add(1, numbers(x, x.shape[1], *x.shape), x),
    "scatter": lambda n, x: x.scatter(1, torch.zeros(x.shape[0], 1, x.shape[2], dtype=torch.long), x[:, :1] * 2),
    "index_add": lambda n, x: x.index_add(1, torch.tensor([0, 1]), x[:, :2].sin()),
    "sort_topk": lambda n, x: x.sort(-1).values[..., :2] + x.topk(2, -1).values,
    # views, joins
    "merge": lambda n, x: x.reshape(-1, x.shape[2]).sin().reshape(x.shape).flatten(1).unflatten(1, (-1, x.shape[2])),
    "permute": lambda n, x: x.permute(2, 0, 1).contiguous().sin().permute(1, 2, 0),
    "expand": lambda n, x: x[:, None].expand(-1, 3, -1, -1).reshape(x.shape[0], -1, x.shape[2]),
    "repeat": lambda n, x: x.repeat(1, 2, 1) + x.repeat_interleave(2, 1),
    "squeeze": lambda n, x: x.unsqueeze(0).unsqueeze(2).squeeze().squeeze(0),
    "split": lambda n, x: torch.cat([part * (i + 1) for i, part in enumerate(x.split(2, 1))], 1),
    "split_one": lambda n, x: x.chunk(2, -1)[0].sin(),
    "unbind": lambda n, x: x.unbind(1)[1] * 2,
    "stack": lambda n, x: torch.stack([x, x.sin()], 1) + torch.stack([x, x.cos()], 0).transpose(0, 1),
    "cat_parameter": lambda n, x: torch.cat([n.w(1, 1, x.shape[2]).expand(x.shape[0], -1, -1), x], 1),
    "roll_flip": lambda n, x: x.roll((1, 2), (1, 2)) + x.flip(1, 2),
    "diagonal": lambda n, x: x.tril() + x.triu(1),
    "cumsum": lambda n, x: x.cumsum(1),
    "fourier": lambda n, x: torch.fft.fftn(x, dim=(1, 2)).real * n.w(x.shape[2]),
    "fourier_real": lambda n, x: torch.fft.irfft2(torch.fft.rfft2(x) * n.w(x.shape[2] // 2 + 1), s=x.shape[1:]),
    "window": lambda n, x: x.unfold(1, 2, 1),
    # reductions
    "sum": lambda n, x: x.sum(1) + x.mean((1, 2), keepdim=True)[:, 0] + x.sum((1, 2))[:, None],
    "extrema": lambda n, x: x.amax(1) + x.max(1).values + x.min(1).values,
    "moments": lambda n, x: x.var(-1) + x.std(-1) + x.norm(dim=-1),
    "prod": lambda n, x: x.prod(-1),
    # in place
    "in_place": lambda n, x: (x * 1).mul_(2).add_(x).relu_(),
    "copy": lambda n, x: torch.empty_like(x).copy_(x),
    "write_slice": lambda n, x: inplace(x, lambda y: y[:, 0].mul_(3)),
    "write_columns": lambda n, x: inplace(x, lambda y: y[:, :, 1:].copy_(x[:, :, 1:].sin())),
    "write_tokens_first": lambda n, x: inplace(x.transpose(0, 1).contiguous(), lambda y: y[1].copy_(x[:, 0].sin()))[1],
    "write_mask": lambda n, x: inplace(
        x, lambda y: y.__setitem__(numbers(x, 2, *x.shape[:2]).bool(), n.w(x.shape[2]))
    ),
    "write_token_each": lambda n, x: inplace(
        x, lambda y: y.__setitem__((torch.arange(x.shape[0]), numbers(x, x.shape[1], x.shape[0])), x[:, 1].sin())
    ),
    "index_copy": lambda n, x: x.index_copy(1, torch.tensor([1]), x[:, :1].sin()),
    # recurrent layers
    "lstm": recurrent,
    "lstm_bidirectional": partial(recurrent, bidirectional=True),
}  # fmt: skip
# Rows are right in these too, but the op works dense.
DENSE_CASES = {
    "range_of_merged_rows": lambda n, x: (
        x[..., :2]
        .transpose(0, 1)
        .flatten(0, 1)[mark_range((x.shape[0] * x.shape[1],), {}), 0]
        .unflatten(0, (-1, len(x)))
        .T
    ),
    "write_rows": lambda n, x: inplace(x, lambda y: y.__setitem__(torch.tensor([1, 0]), x[:2].sin())),
    "batch_statistics": lambda n, x: F.batch_norm(x, None, None, n.w(x.shape[1]), n.w(x.shape[1]), training=True),
    "across_samples": lambda n, x: x.flatten(1) @ x.flatten(1).t(),
    "across_samples_softmax": lambda n, x: x.softmax(0) + x.cumsum(0),
    "part_of_batch": lambda n, x: torch.cat([x[1:], x[:1]]),
    "as_strided": lambda n, x: (x * 1).as_strided((x.shape[0], 2), (x.shape[1] * x.shape[2], 1)),
}


def gradients(case, x, take, net):
    x = x.clone().requires_grad_()
    net.count = 0
    torch.manual_seed(0)
    out = case(net, x)
    factor = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    losses = (out * factor).flatten(1).sum(1) if out.ndim > 1 else out * factor
    for p in net.parameters:
        p.grad = None
    take(losses).mean().backward()
    grads = [x.grad, *(p.grad for p in net.parameters)]
    assert all(g is None or type(g) is torch.Tensor for g in grads)
    return grads


def compare(case, data):
    kept = data.draw(rows())
    time, features = data.draw(st.integers(2, 4)), data.draw(st.integers(3, 5))
    x = torch.randn(kept.batch, time, features, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
    net = Net()
    dense = gradients(case, x, lambda losses: losses[kept.index], net)
    reset_fallbacks()
    # With all rows kept, too.
    sparse = gradients(case, x, lambda losses: take_rows_sparse(losses, kept.index, dense_above=1.0), net)
    for a, b in zip(dense, sparse, strict=True):
        if a is not None:
            close(a, b)
