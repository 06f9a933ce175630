"""Each rule against dense autograd, on random shapes and random kept rows, including one row and nearly all."""

import copy
import gc
import weakref
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hf_trim.backward.eager.activation import ActivationRows
from hf_trim.backward.eager.rows import Rows
from hf_trim.backward.eager.rules.pointwise import dense_rule
from hf_trim.backward.eager.saved import COMPUTE_WITH_SAVED
from hf_trim.backward.eager.sparse import take_rows_sparse
from hf_trim.backward.eager.tensor import RowSparseTensor, densify
from hf_trim.backward.registry import GRADIENTS, implements
from hf_trim.backward.settings import fallback_report, reset_fallbacks, strict


few = settings(max_examples=8, deadline=None, derandomize=True)


@pytest.fixture(scope="module", autouse=True)
def rows_of_whatever_was_saved():
    with patch("hf_trim.backward.eager.saved.MIN_ELEMENTS", 0):  # in small tensors too
        yield


@st.composite
def rows(draw):
    batch = draw(st.integers(2, 7))
    kept = draw(st.sets(st.integers(0, batch - 1), min_size=1, max_size=batch))
    return Rows(torch.tensor(sorted(kept)), batch)


def close(a, b):
    torch.testing.assert_close(densify(a), densify(b), rtol=1e-4, atol=1e-5)


# ---- whole backward passes: f(x) with x [B, T, C]; weights are made inside with a fixed seed ------------------------


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
    "window": lambda n, x: x.unfold(1, 2, 1),
    # reductions
    "sum": lambda n, x: x.sum(1) + x.mean((1, 2), keepdim=True)[:, 0] + x.sum((1, 2))[:, None],
    "extrema": lambda n, x: x.amax(1) + x.max(1).values + x.min(1).values,
    "moments": lambda n, x: x.var(-1) + x.std(-1) + x.norm(dim=-1),
    "prod": lambda n, x: x.prod(-1),
    # in place
    "in_place": lambda n, x: (x * 1).mul_(2).add_(x).relu_(),
    "copy": lambda n, x: torch.empty_like(x).copy_(x),
}  # fmt: skip
# Rows are right in these too, but the op works dense: nodes that write into a part of another tensor.
DENSE_CASES = {
    "write_slice": lambda n, x: inplace(x, lambda y: y[:, 0].mul_(3)),
    "write_columns": lambda n, x: inplace(x, lambda y: y[:, :, 1:].copy_(x[:, :, 1:].sin())),
    "batch_statistics": lambda n, x: F.batch_norm(x, None, None, n.w(x.shape[1]), n.w(x.shape[1]), training=True),
    "across_samples": lambda n, x: x.flatten(1) @ x.flatten(1).t(),
    "across_samples_softmax": lambda n, x: x.softmax(0) + x.cumsum(0),
    "part_of_batch": lambda n, x: torch.cat([x[1:], x[:1]]),
    "shuffled": lambda n, x: x[torch.arange(x.shape[0]).flip(0), 0],
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
    with patch("hf_trim.backward.eager.sparse.DENSE_ABOVE", 1):  # with all rows kept too
        sparse = gradients(case, x, lambda losses: take_rows_sparse(losses, kept.index), net)
    for a, b in zip(dense, sparse, strict=True):
        if a is not None:
            close(a, b)


@pytest.mark.parametrize("name", CASES)
@few
@given(data=st.data())
def test_case(name, data):
    compare(CASES[name], data)
    assert not fallback_report()


@pytest.mark.parametrize("name", DENSE_CASES)
@few
@given(data=st.data())
def test_dense_case(name, data):
    compare(DENSE_CASES[name], data)


# ---- single ops on every layout: rows along any dimension, merged with others --------------------------------------


@st.composite
def gradient(draw):
    kept = draw(rows())
    dim, outer, inner = draw(st.integers(0, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    shape = [draw(st.integers(1, 3)) for _ in range(3)]
    shape[dim] = outer * kept.count * inner
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    if draw(st.booleans()):  # a memory layout other than the default
        values = values.transpose(0, 2).contiguous().transpose(0, 2)
    return RowSparseTensor(values, kept, dim, outer, inner)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(gradient())
def test_take_and_densify_are_inverse(grad):
    dense = grad.densify()
    assert dense.shape == grad.shape and dense.stride() == grad.stride()
    close(grad.kept_rows(dense), grad.payload)
    assert dense.count_nonzero() == grad.payload.count_nonzero()
    close(grad.sparsify(dense), dense)


def _and_views(x):
    return x, (x[:1], x[:2])


OPS = {
    "mul": lambda g, x: g * x,
    "mul_broadcast": lambda g, x: g * x[:1] + g * x[0, 0],
    "rdiv": lambda g, x: g / (x.abs() + 1),
    "add": lambda g, x: g + g.sin() - g * 2,
    "add_dense": lambda g, x: g + x,
    "dense_sub": lambda g, x: x - g,
    "dense_add_in_place": lambda g, x: x.clone().add_(g),
    "add_number": lambda g, x: g + 1,
    "exp": lambda g, x: g.exp(),
    "view_flat": lambda g, x: g.contiguous().view(-1),
    "view_split": lambda g, x: g.reshape(*g.shape[:2], 1, g.shape[2]),
    "view_merge": lambda g, x: g.reshape(g.shape[0], -1),
    "view_merge_front": lambda g, x: g.reshape(-1, g.shape[2]),
    "transpose": lambda g, x: g.transpose(0, 2).sin(),
    "permute": lambda g, x: g.permute(1, 2, 0),
    "expand": lambda g, x: g.unsqueeze(1).expand(-1, 4, -1, -1) * 2,
    "squeeze": lambda g, x: g.unsqueeze(-1).squeeze(),
    "sum_0": lambda g, x: g.sum(0),
    "sum_1": lambda g, x: g.sum((1,), keepdim=True),
    "sum_all": lambda g, x: g.sum(),
    "mean": lambda g, x: g.mean((0, 2)),
    "norm": lambda g, x: torch.linalg.vector_norm(g),
    "bmm_left": lambda g, x: g @ x.transpose(1, 2),
    "bmm_right": lambda g, x: x.transpose(1, 2) @ g,
    "mm_left": lambda g, x: g[0] @ x[0].t(),
    "cat": lambda g, x: torch.cat([g, g * 2], 2),
    "cat_dense": lambda g, x: torch.cat([g, x], 1),
    "stack": lambda g, x: torch.stack([g, g.sin()], 1),
    "select": lambda g, x: g[:, 0],
    "slice": lambda g, x: g[:, :, 1:],
    "split": lambda g, x: g.split(2, 1)[0],
    "flip_roll": lambda g, x: g.flip(1).roll(1, 2),
    "pad": lambda g, x: F.pad(g, (1, -1)) if g.shape[2] > 1 else g,
    "any": lambda g, x: g.isnan().any(),
    "copy_to_dense": lambda g, x: x.clone().copy_(g),
    "in_place": lambda g, x: g.clone().mul_(2).mul_(x).neg_(),
    "in_place_dense": lambda g, x: g.clone().add_(x).add_(1),
    "in_place_view": lambda g, x: (lambda c: (c[:, 0].mul_(3), c)[1])(g.clone()),
    "in_place_row_view": lambda g, x: (lambda c: (c[0].add_(3), c)[1])(g.clone()),
    "in_place_row_view_of_a_view": lambda g, x: (lambda c: (c.unsqueeze(1)[0].add_(3), c)[1])(g.clone()),
    "in_place_two_row_views": lambda g, x: (lambda c: ([v.add_(3) for v in (c[0], c[1:], c[:1])], c)[1])(g.clone()),
    "in_place_row_views_held": lambda g, x: (lambda c, v: (v[0].add_(3), v[1].mul_(2), c)[2])(*_and_views(g.clone())),
    "row_views_of_a_view": lambda g, x: (lambda v: torch.cat([v[1:], v[:1]]))(g.clone().unsqueeze(1)),
    "zero": lambda g, x: g.clone().zero_(),
    "new_zeros": lambda g, x: torch.zeros_like(g) + g.new_zeros(g.shape),
}


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(grad=gradient())
def test_op(name, grad):
    dense = grad.densify()
    x = torch.randn(grad.shape, generator=torch.Generator().manual_seed(0))
    try:
        expected = OPS[name](dense, x)
    except RuntimeError:
        return  # the layout does not allow it: a view across strides
    try:
        close(OPS[name](grad, x), expected)
    except RuntimeError as error:
        assert "Work on a copy" in str(error)  # refused, not wrong
    close(grad, dense)


def test_a_view_that_cannot_be_written_to_says_so():
    grad = RowSparseTensor(torch.ones(2, 3), Rows(torch.tensor([1, 4]), 6))
    view = grad.unsqueeze(1)[1:]  # of a view, and along the rows
    close(view, grad.densify()[1:, None])
    close(view.flip(0), grad.densify()[1:, None].flip(0))
    for change in (lambda x: x.add_(1), lambda x: x.zero_(), lambda x: x.copy_(view), lambda x: x[:, 0].mul_(2)):
        with pytest.raises(RuntimeError, match="Work on a copy"):
            change(view)
    close(grad.unsqueeze(1)[1:], view)


# ---- the engine's promises -----------------------------------------------------------------------------------------


@pytest.fixture
def losses():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(6, 3, requires_grad=True)
    hidden = net(x)
    return net, x, hidden, F.cross_entropy(hidden, torch.tensor([0, 1] * 3), reduction="none")


KEPT = torch.tensor([1, 4])


def test_backward_hooks_and_retained_gradients_see_a_tensor(losses):
    net, x, hidden, values = losses
    (expected,) = torch.autograd.grad(values[KEPT].sum(), hidden, retain_graph=True)
    seen = []
    hidden.retain_grad()
    hidden.register_hook(lambda grad: seen.append(grad.norm().item()))
    hidden.register_hook(lambda grad: grad * 1)
    x.register_hook(lambda grad: seen.append(grad.abs().max()))
    take_rows_sparse(values, KEPT).sum().backward()
    close(hidden.grad, expected)
    assert len(seen) == 2 and seen[0] == pytest.approx(expected.norm().item())
    assert hidden.grad.numpy().shape == (6, 2) and len(hidden.grad.tolist()) == 6
    close(copy.deepcopy(hidden.grad), expected)
    assert "kept=2" in repr(hidden.grad)
    assert type(x.grad) is torch.Tensor


def test_double_backward(losses):
    net, x, _, values = losses
    weights = list(net.parameters())
    penalty = []
    for kept in (values[KEPT], take_rows_sparse(values, KEPT)):
        (grad,) = torch.autograd.grad(kept.sum(), x, create_graph=True)
        penalty.append(torch.autograd.grad(grad.square().sum(), weights[0], retain_graph=True)[0])
    close(*penalty)


def test_anomaly_mode(losses):
    net, x, _, values = losses
    with torch.autograd.set_detect_anomaly(True):
        take_rows_sparse(values, KEPT).sum().backward()
    assert type(x.grad) is torch.Tensor


def test_several_selections_and_a_plain_loss(losses):
    net, x, hidden, values = losses
    other = torch.tensor([0, 1, 5])
    (expected,) = torch.autograd.grad(
        values[KEPT].sum() + values[other].mean() + hidden.square().mean(), x, retain_graph=True
    )
    total = take_rows_sparse(values, KEPT).sum() + take_rows_sparse(values, other).mean() + hidden.square().mean()
    total.backward(retain_graph=True)
    close(x.grad, expected)
    total.backward()
    close(x.grad, 2 * expected)


class WholeBatch(TorchDispatchMode):
    """The ops that ran on ordinary tensors of a whole batch."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.ops = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not types and any(isinstance(x, torch.Tensor) and x.shape == self.shape for x in args):
            self.ops.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


COMPUTE_FIRST = {
    "Abs": torch.abs, "Acos": torch.acos, "Asin": torch.asin, "Asinh": torch.asinh, "Atan": torch.atan,
    "Clamp": lambda x: x.clamp(0.1, 0.5), "ClampMax": lambda x: x.clamp_max(0.5), "ClampMin": lambda x: x.clamp(0.1),
    "Cos": torch.cos, "Cosh": torch.cosh, "Div": lambda x: x / x, "Erf": torch.erf, "Erfc": torch.erfc,
    "Expm1": torch.expm1, "Log1P": torch.log1p, "Log2": torch.log2, "Log10": torch.log10, "Pow": lambda x: x**3,
    "Reciprocal": torch.reciprocal, "Rsqrt": torch.rsqrt, "Sin": torch.sin, "Sinh": torch.sinh, "Sqrt": torch.sqrt,
    "Tan": torch.tan, "Xlogy": lambda x: torch.xlogy(x, x), "Pow of tensors": lambda x: x**x,
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTE_FIRST)
def test_formulas_compute_with_the_kept_rows_of_what_was_saved(name):
    x = torch.rand(6, 3, 4, requires_grad=True)
    loss = take_rows_sparse(COMPUTE_FIRST[name](x).sum((1, 2)), KEPT).sum()
    with WholeBatch(x.shape) as whole:
        loss.backward()
    assert set(whole.ops) <= {"index_select", "detach", "zero_", "index_copy_"}, whole.ops


def test_each_formula_is_tested():
    names = {f"{name.split()[0]}Backward{number}" for name in COMPUTE_FIRST for number in (0, 1)}
    assert names == COMPUTE_WITH_SAVED


def test_a_saved_tensor_serves_several_selections_and_a_plain_loss():
    x = torch.rand(6, 3, requires_grad=True)
    powers = x**3
    for kept in (KEPT, torch.tensor([0, 1, 5]), None):
        x.grad = None
        total = powers.sum(1)
        (total if kept is None else take_rows_sparse(total, kept)).sum().backward(retain_graph=True)
        expected = torch.zeros(6, 3).index_copy(0, kept, 3 * x.detach()[kept] ** 2) if kept is not None else 3 * x**2
        close(x.grad, expected.detach())


@pytest.mark.parametrize("changed_first", [True, False])
def test_a_saved_tensor_that_was_changed_is_an_error(changed_first):
    x = torch.rand(6, 3, requires_grad=True) * 2
    total = (x**3).sum(1)
    if changed_first:
        x.detach().add_(1)
    loss = take_rows_sparse(total, KEPT).sum()
    if not changed_first:
        x.detach().add_(1)
    with pytest.raises(RuntimeError, match="in.?place operation"):
        loss.backward()


def test_tensors_saved_with_hooks_of_others_stay_theirs():
    x = torch.rand(6, 3, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        total = (x**3).sum(1)
    take_rows_sparse(total, KEPT).sum().backward()
    close(x.grad[KEPT], 3 * x.detach()[KEPT] ** 2)


class Custom(torch.autograd.Function):
    """Reads memory, as a compiled kernel would."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        assert type(grad) is torch.Tensor and grad.data_ptr()
        return grad * 2


def test_python_functions_get_ordinary_gradients():
    x = torch.randn(6, 3, requires_grad=True)
    seen = []
    hidden = x.sin()
    hidden.register_hook(lambda grad: seen.append(type(grad)))
    reset_fallbacks()
    take_rows_sparse(Custom.apply(hidden).sum(1), KEPT).sum().backward()
    assert fallback_report() == {"CustomBackward": 1}
    assert seen == [RowSparseTensor]  # behind the Function the gradient is row-sparse again
    expected = torch.zeros_like(x)
    expected[KEPT] = 4 / 2 * x.detach()[KEPT].cos()
    close(x.grad, expected)


def test_strict_names_the_op_or_node():
    x = torch.randn(6, 3, requires_grad=True)
    with strict(), pytest.raises(RuntimeError, match=r"aten.flip.*\(6, 3\)"):
        take_rows_sparse(x.cumsum(0).sum(1), KEPT).sum().backward()
    with strict(), pytest.raises(RuntimeError, match="CustomBackward"):
        take_rows_sparse(Custom.apply(x).sum(1), KEPT).sum().backward()
    reset_fallbacks()
    take_rows_sparse(x.cumsum(0).sum(1), KEPT).sum().backward()
    assert fallback_report()


def test_compiled_model(losses):
    net, _, _, _ = losses
    x, labels = torch.randn(6, 3), torch.tensor([0, 1] * 3)
    compiled = torch.compile(net, backend="aot_eager")
    gradients = []
    for take in (lambda v: v[KEPT], lambda v: take_rows_sparse(v, KEPT)):
        net.zero_grad()
        take(F.cross_entropy(compiled(x), labels, reduction="none")).mean().backward()
        gradients.append(net[0].weight.grad.clone())
    close(*gradients)


def test_aot_autograd_densifies_a_tangent():
    grad = RowSparseTensor(torch.randn(2, 3), Rows(KEPT, 6))
    assert type(grad.__coerce_same_metadata_as_tangent__(None)) is torch.Tensor


def test_nearly_all_rows_take_the_dense_path(losses):
    values = losses[-1]
    assert "IndexSelect" in type(take_rows_sparse(values, torch.arange(6)).grad_fn).__name__


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="Expected"):
        take_rows_sparse(torch.tensor(0.0), KEPT)
    with pytest.raises(ValueError, match="Expected"):
        take_rows_sparse(torch.zeros(2), KEPT[:0])


def test_own_rule():
    op = torch.ops.aten.frac.default
    before = GRADIENTS.pop(op, None)

    @implements(op)
    def frac(func, x):
        return x.like(func(x.payload) * 1)

    try:
        grad = RowSparseTensor(torch.randn(2, 3), Rows(KEPT, 6))
        close(grad.frac(), grad.densify().frac())
        assert GRADIENTS[op] is frac
    finally:
        GRADIENTS.pop(op)
        GRADIENTS.registered.discard(op)
        GRADIENTS.update({} if before is None else {op: before})


# ---- gradient checkpointing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(data=st.data())
def test_checkpointed_case(name, data):
    def case(net, x):
        def run(x):
            net.count = 0
            return CASES[name](net, x)

        return checkpoint(run, x, use_reentrant=False)

    compare(case, data)
    assert not fallback_report()


def make_layers(dropout):
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(3, 3), nn.Dropout(dropout), nn.Tanh()) for _ in range(3)]


def compare_checkpointed(layers, reentrant=False):
    """Gradients of the input and all weights, dense and row-sparse."""
    x = torch.randn(6, 3, requires_grad=True)
    gradients = []
    for take in (lambda v: v[KEPT], lambda v: take_rows_sparse(v, KEPT)):
        torch.manual_seed(1)
        hidden = x
        for layer in layers:
            layer.zero_grad()
            hidden = checkpoint(layer, hidden, use_reentrant=reentrant)
        x.grad = None
        take(hidden.square().sum(1)).mean().backward()
        gradients.append([x.grad, *(p.grad.clone() for layer in layers for p in layer.parameters())])
    for a, b in zip(*gradients, strict=True):
        close(a, b)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing(reentrant, dropout, recomputed):
    compare_checkpointed(make_layers(dropout), reentrant)
    assert recomputed == {"kept": 0 if reentrant else 3, "all": 0}


def test_checkpointed_function_that_mixes_samples(recomputed):
    class Mixing(nn.Module):
        def forward(self, x):
            return (x - x.mean(0)).sin()

    first, *others = make_layers(0.5)
    compare_checkpointed([first, Mixing(), *others])
    assert recomputed == {"kept": 2, "all": 1}  # what comes after the failure does not try


def test_checkpointed_op_without_a_gradient_rule(recomputed, monkeypatch):
    """Then the op's other rows are wanted after all."""
    monkeypatch.setitem(GRADIENTS, torch.ops.aten.tanh_backward.default, dense_rule)
    compare_checkpointed(make_layers(0.5))
    assert fallback_report()
    assert recomputed == {"kept": 1, "all": 0}


def test_checkpoints_serve_several_selections_and_a_plain_loss():
    layer, x = make_layers(0.5)[0], torch.randn(6, 3, requires_grad=True)
    hidden = checkpoint(layer, checkpoint(layer, x, use_reentrant=False), use_reentrant=False)
    values, other = hidden.square().sum(1), torch.tensor([0, 1, 5])
    losses = [lambda: values[KEPT].sum(), lambda: values[other].mean(), lambda: values.sum()]
    expected = [torch.autograd.grad(loss(), x, retain_graph=True)[0] for loss in losses]
    first, second = take_rows_sparse(values, KEPT).sum(), take_rows_sparse(values, other).mean()
    close(torch.autograd.grad(first, x, retain_graph=True)[0], expected[0])
    close(torch.autograd.grad(values.sum(), x, retain_graph=True)[0], expected[2])
    close(torch.autograd.grad(second, x, retain_graph=True)[0], expected[1])
    close(torch.autograd.grad(first + second + values.sum(), x)[0], sum(expected))


def test_recomputed_activations_are_freed_layer_by_layer():
    layers, alive, most = make_layers(0.0) * 4, weakref.WeakSet(), []

    class Counted(nn.Module):
        def forward(self, x):
            hidden = x.sin()
            if isinstance(hidden, ActivationRows):
                alive.add(hidden)
                most.append(len(alive))
            return hidden.cos()

    gc.disable()
    try:
        compare_checkpointed([nn.Sequential(layer, Counted()) for layer in layers])
    finally:
        gc.enable()
    assert len(most) == 12 and max(most) <= 2
