"""
Forward ops on activations of which the kept rows are known (`checkpoint.py`, `saved.py`).

What `rules/__init__.py` says of a rule holds here with one difference: the rows that are not kept are *unknown*, not
zero. A sum over rows is therefore never right; an elementwise op need not keep zeros. Random numbers are drawn for all
rows, and the kept rows of them are taken: they are then those of the forward pass.

e.g. `linear(x, weight)` with `x` `[B·T, H]`, B = 4, T = 2, rows 1 and 3 kept: `addmm` on the payload `[2·2, H]`.
`x.mean(0)` needs the rows that are unknown: `NotRowwiseError`.
"""

import torch

from hf_trim.backward._torch_internals import argument_names, is_composite, is_mutable, return_types
from hf_trim.backward.eager.activation import ActivationRows
from hf_trim.backward.eager.rows import NotRowwiseError
from hf_trim.backward.eager.rules.operands import (
    find_reference,
    kept_payloads,
    require,
    require_other_dim,
    require_samples,
    run_by_row,
    wrap_outputs,
)
from hf_trim.backward.eager.rules.pointwise import decomposed, is_pointwise
from hf_trim.backward.eager.tensor import RowTensor
from hf_trim.backward.registry import ACTIVATIONS, implements


def default_rule(op):
    """The rule of an op that has none of its own: elementwise if its tags say so, else none."""
    if is_composite(op):
        return decomposed
    if is_pointwise(op) and torch.Tag.nondeterministic_seeded not in op.tags and len(return_types(op)) == 1:
        return in_place if is_mutable(op) else pointwise
    return no_rule


ACTIVATIONS.default = default_rule


def no_rule(func, *args, **kwargs):
    raise NotRowwiseError(f"{func} has no forward rule")


def pointwise(func, *args, **kwargs):
    return run_by_row(func, find_reference(args, ActivationRows), args, kwargs)


def require_activation(x):
    """`x`, which must be the operand that carries rows."""
    require(isinstance(x, ActivationRows), "this operand is expected to be the one of kept rows")
    return x


@implements("fill_.Scalar", "zero_", "masked_fill_.Scalar", "masked_fill_.Tensor", table=ACTIVATIONS)
def in_place(func, x, *args, **kwargs):
    func(*kept_payloads(require_activation(x), (x, *args), kwargs), **kwargs)
    return x


# ---- factories, reductions ---------------------------------------------------------------------------------------


@implements("empty_like", "zeros_like", "ones_like", "full_like", table=ACTIVATIONS)
def fill(func, x, *args, **kwargs):
    return x.like(func(x.payload, *args, **kwargs))


@implements("sum.dim_IntList", "mean.dim", "amax", "amin", table=ACTIVATIONS)
@implements("var.correction", "std.correction", "linalg_vector_norm", table=ACTIVATIONS)
def reduce(func, x, *args, **kwargs):
    named = name_arguments(func, 1, args, kwargs)
    require(bool(named.get("dim")), "rows are reduced")
    dims = [require_other_dim(x, d) for d in named["dim"]]
    removed = 0 if named.get("keepdim") else sum(d < x.row_dim for d in dims)
    return x.like(func(x.payload, **named), x.row_dim - removed)


def name_arguments(func, skipped, args, kwargs) -> dict:
    """The arguments of an op behind its first ones, by name."""
    return {**dict(zip(argument_names(func)[skipped:], args, strict=False)), **kwargs}


# ---- matrix products ---------------------------------------------------------------------------------------------


@implements("mm", "bmm", "addmm", "baddbmm", table=ACTIVATIONS)
def matmul(func, *args, **kwargs):
    """`[n, m] @ [m, p]`, with or without a batch dimension; rows along n, p or the batch, but not along m."""
    *bias, a, b = args
    ref = find_reference((a, b), ActivationRows)
    first = ref.ndim - 2  # where the matrix dimensions begin
    dim = ref.row_dim - ref.ndim
    if ref.row_dim < first:
        a, b = ref.kept_rows(a), ref.kept_rows(b)
    else:
        require(
            not (isinstance(a, RowTensor) and isinstance(b, RowTensor)),
            "both operands carry rows, in different dimensions",
        )
        require(ref.row_dim == first + (ref is b), "rows are summed")
        a, b = (ref.payload, b) if ref is a else (a, ref.payload)
    bias = [ref.kept_rows_or_broadcast(x, dim) for x in bias]
    return ref.like(func(*bias, a, b, **kwargs))


# ---- neural-network ops ------------------------------------------------------------------------------------------


@implements("native_layer_norm", "_fused_rms_norm", table=ACTIVATIONS)
def norm(func, x, normalized_shape, *args):
    require(require_activation(x).row_dim < x.ndim - len(normalized_shape), "rows are normalized")
    return wrap_outputs(x, func(x.payload, normalized_shape, *args))


@implements("native_group_norm", table=ACTIVATIONS)
def group_norm(func, x, weight, bias, N, C, HxW, group, eps):
    require_samples(require_activation(x))
    return wrap_outputs(x, func(x.payload, weight, bias, x.rows.count, C, HxW, group, eps))


@implements("_softmax", "_log_softmax", "_safe_softmax", "glu", table=ACTIVATIONS)
def softmax(func, x, dim=-1, *args, **kwargs):
    require_other_dim(x, dim)
    return x.like(func(x.payload, dim, *args, **kwargs))


@implements("convolution", table=ACTIVATIONS)
def convolution(func, x, weight, *args):
    require_samples(require_activation(x))
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
    require_samples(require_activation(query))
    named = name_arguments(func, 3, args, kwargs)
    require(not named.get("dropout_p"), "dropout inside the kernel")  # its mask would be another one
    for name in ("attn_mask", "attn_bias"):
        if named.get(name) is not None:
            named[name] = query.kept_rows_or_broadcast(named[name], -4)
    outs = func(query.payload, query.kept_rows(key), query.kept_rows(value), **named)
    return *wrap_outputs(query, outs[:2]), *outs[2:]  # result and logsumexp, then random state and sizes


# ---- random numbers ----------------------------------------------------------------------------------------------


def empty_batch(x):
    """An uninitialized tensor of the whole batch's shape and memory layout."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


@implements("bernoulli_.float", "uniform_", "normal_", table=ACTIVATIONS)
def draw_in_place(func, x, *args, **kwargs):
    x.payload.copy_(x.kept_rows(func(empty_batch(x), *args, **kwargs)))
    return x


@implements("rand_like", "randn_like", table=ACTIVATIONS)
def draw_like(func, x, **kwargs):
    return x.like(x.kept_rows(func(empty_batch(x), **kwargs)))


@implements("native_dropout", table=ACTIVATIONS)
def native_dropout(func, x, p, train):
    scale, mask = (x.kept_rows(out) for out in func(empty_batch(x).fill_(1), p, train))
    return x.like(x.payload * scale), x.like(mask)
