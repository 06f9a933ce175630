"""
Rules: how ATen's forward ops work on activations of which the kept rows are known (`checkpoint.py`).

What `rules.py` says of a rule holds here with one difference: the rows that are not kept are *unknown*, not zero. A
sum over rows is therefore never right; an elementwise op need not keep zeros. Random numbers are drawn for the whole
batch, so that they are those of the forward pass, and the kept rows of them are taken.
"""

import torch

from hf_trim.backward.eager.rules import indexing, nn  # noqa: F401 (some of their rules serve here too)
from hf_trim.backward.eager.rules.pointwise import (
    POINTWISE,
    by_row,
    factory,
    other_dim,
    payloads_of,
    reference,
    require,
    samples,
)
from hf_trim.backward.eager.tensor import (
    ActivationRows,
    NotRowwiseError,
    RowTensor,
)
from hf_trim.backward.registry import ACTIVATIONS, GRADIENTS, implements, overloads


def default_rule(func):
    """The rule of an op that has none of its own: elementwise if its tags say so, else none."""
    random = torch.Tag.nondeterministic_seeded in func.tags
    if not random and (torch.Tag.pointwise in func.tags or func.overloadpacket.__name__ in POINTWISE):
        return in_place if func._schema.is_mutable else pointwise
    return no_rule


ACTIVATIONS.default = default_rule


def no_rule(func, *args, **kwargs):
    raise NotRowwiseError(f"{func} has no forward rule")


def pointwise(func, *args, **kwargs):
    require(len(func._schema.returns) == 1, "it returns several tensors")
    return by_row(func, reference(args, ActivationRows), args, kwargs)


def activation(x):
    """`x` if its kept rows are known; the rule needs it to be the one."""
    require(isinstance(x, ActivationRows), "this operand is expected to be the one of kept rows")
    return x


@implements("fill_.Scalar", "zero_", "masked_fill_.Scalar", "masked_fill_.Tensor", table=ACTIVATIONS)
def in_place(func, x, *args, **kwargs):
    require(not (activation(x).is_view or x.has_views), "it changes something else too")
    func(*payloads_of(x, (x, *args), kwargs), **kwargs)
    return x


# ---- structure: the rules of gradients serve as they are ---------------------------------------------------------

STRUCTURE = overloads(
    "alias", "detach", "view_as_real", "view_as_complex", "lift_fresh", "view", "_unsafe_view", "reshape",
    "_reshape_alias", "t", "transpose.int", "permute", "expand", "unsqueeze", "squeeze", "squeeze.dim", "squeeze.dims",
    "select.int", "slice.Tensor", "split.Tensor", "split_with_sizes", "unbind.int", "unfold", "roll", "flip",
    "constant_pad_nd", "tril", "triu", "cumsum", "im2col", "col2im", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "index_select", "gather",
)  # fmt: skip
for _op in STRUCTURE:
    ACTIVATIONS.register(_op, dict(GRADIENTS)[_op])  # not looked for: a missing rule is an error
implements("new_empty", "new_zeros", "new_ones", "new_full", table=ACTIVATIONS)(factory)


@implements("empty_like", "zeros_like", "ones_like", "full_like", table=ACTIVATIONS)
def fill(func, x, *args, **kwargs):
    return x.like(func(x.payload, *args, **kwargs))


@implements("cat", table=ACTIVATIONS)
def cat(func, tensors, dim=0):
    ref = reference(tensors, ActivationRows)
    dim = other_dim(ref, dim)
    return ref.like(func([ref.kept_rows(x) for x in tensors], dim))


@implements("stack", table=ACTIVATIONS)
def stack(func, tensors, dim=0):
    ref = reference(tensors, ActivationRows)
    dim %= ref.ndim + 1
    return ref.like(func([ref.kept_rows(x) for x in tensors], dim), ref.row_dim + (dim <= ref.row_dim))


@implements(
    "sum.dim_IntList",
    "mean.dim",
    "amax",
    "amin",
    "var.correction",
    "std.correction",
    "linalg_vector_norm",
    table=ACTIVATIONS,
)
def reduce(func, x, *args, **kwargs):
    named = by_name(func, 1, args, kwargs)
    require(bool(named.get("dim")), "rows are reduced")
    dims = [other_dim(x, d) for d in named["dim"]]
    gone = 0 if named.get("keepdim") else sum(d < x.row_dim for d in dims)
    return x.like(func(x.payload, **named), x.row_dim - gone)


def by_name(func, skipped, args, kwargs) -> dict:
    """The arguments of an op behind its first ones, by name."""
    names = [each.name for each in func._schema.arguments[skipped:]]
    return {**dict(zip(names, args, strict=False)), **kwargs}


# ---- matrix products ---------------------------------------------------------------------------------------------


@implements("mm", "bmm", "addmm", "baddbmm", table=ACTIVATIONS)
def matmul(func, *args, **kwargs):
    """`[n, m] @ [m, p]`, with or without a batch dimension; rows along n, p or the batch, but not along m."""
    *added, a, b = args
    ref = reference((a, b), ActivationRows)
    first = ref.ndim - 2  # where the matrix dimensions begin
    at = ref.row_dim - ref.ndim
    if ref.row_dim < first:
        a, b = ref.kept_rows(a), ref.kept_rows(b)
    else:
        require(not (isinstance(a, RowTensor) and isinstance(b, RowTensor)), "both operands carry rows apart")
        require(ref.row_dim == first + (ref is b), "rows are summed")
        a, b = (ref.payload, b) if ref is a else (a, ref.payload)
    added = [ref.kept_rows_or_broadcast(x, at) for x in added]
    return ref.like(func(*added, a, b, **kwargs))


# ---- neural-network ops ------------------------------------------------------------------------------------------


@implements("native_layer_norm", "_fused_rms_norm", table=ACTIVATIONS)
def norm(func, x, normalized_shape, *args):
    require(activation(x).row_dim < x.ndim - len(normalized_shape), "rows are normalized")
    return tuple(x.like(out) for out in func(x.payload, normalized_shape, *args))


@implements("native_group_norm", table=ACTIVATIONS)
def group_norm(func, x, weight, bias, N, C, HxW, group, eps):
    samples(activation(x))
    return tuple(x.like(out) for out in func(x.payload, weight, bias, x.rows.count, C, HxW, group, eps))


@implements("_softmax", "_log_softmax", "_safe_softmax", "glu", table=ACTIVATIONS)
def softmax(func, x, dim=-1, *args, **kwargs):
    other_dim(x, dim)
    return x.like(func(x.payload, dim, *args, **kwargs))


@implements("convolution", table=ACTIVATIONS)
def convolution(func, x, weight, *args):
    samples(activation(x))
    require(x.ndim == weight.ndim and not isinstance(weight, RowTensor), "rows are not samples")
    return x.like(func(x.payload, weight, *args))


@implements("embedding", table=ACTIVATIONS)
def embedding(func, weight, indices, *args):
    require(not isinstance(weight, RowTensor), "rows of the table are unknown")
    return indices.like(func(weight, indices.payload, *args))


@implements(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    table=ACTIVATIONS,
)
def attention(func, query, key, value, *args, **kwargs):
    samples(activation(query))
    named = by_name(func, 3, args, kwargs)
    require(not named.get("dropout_p"), "dropout inside the kernel")
    for name in ("attn_mask", "attn_bias"):
        if named.get(name) is not None:
            named[name] = query.kept_rows_or_broadcast(named[name], -4)
    outs = func(query.payload, query.kept_rows(key), query.kept_rows(value), **named)
    return *(query.like(out) for out in outs[:2]), *outs[2:]  # result and logsumexp, then random state and sizes


# ---- random numbers ----------------------------------------------------------------------------------------------


def whole_batch(x):
    """An empty tensor of the whole batch's shape and memory layout."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


@implements("bernoulli_.float", "uniform_", "normal_", table=ACTIVATIONS)
def draw_in_place(func, x, *args, **kwargs):
    require(not (x.is_view or x.has_views), "it changes a view")
    x.payload.copy_(x.kept_rows(func(whole_batch(x), *args, **kwargs)))
    return x


@implements("rand_like", "randn_like", table=ACTIVATIONS)
def draw_like(func, x, **kwargs):
    return x.like(x.kept_rows(func(whole_batch(x), **kwargs)))


@implements("native_dropout", table=ACTIVATIONS)
def native_dropout(func, x, p, train):
    scale, mask = (x.kept_rows(out) for out in func(whole_batch(x).fill_(1), p, train))
    return x.like(x.payload * scale), x.like(mask)
