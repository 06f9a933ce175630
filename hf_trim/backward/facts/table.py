"""
The facts. A line names ops (with their overload if it is not the default one), what their arguments are, and where
their results have their rows (and when it needs the whole batch), in the terms of
[`~hf_trim.backward.facts.fact.Fact`].

e.g. `"gather": ("grad . saved", apart(1))` of `gather(x, dim, index)`: `x` and `index` carry the same rows in the same
dimension, and the result has them there too, if `dim` is another one. It is zero where `x` is.
"""

from typing import Any

from hf_trim.backward.facts.fact import (
    Fact,
    always,
    apart,
    attention,
    before_last,
    drops,
    first,
    inserted,
    loss,
    other_dim,
    reduced,
    require,
    same,
    selected,
    sliced,
    squeezed,
    summed,
    transposed,
)


def _permuted(x, dims):
    return [dim % x.ndim for dim in dims].index(x.row_dim)


def _unfolded(grad, size, dim, *_):
    require(grad.row_dim < len(size) and grad.row_dim != dim % len(size), "it works along the rows")
    return grad.row_dim


def _rolled(x, shifts, dims=()):
    require(len(dims) > 0, "it works along the rows")
    return apart(1)(x, dims)


def _repeated(x, repeats):
    row_dim = x.row_dim + len(repeats) - x.ndim
    require(repeats[row_dim] == 1, "rows are repeated")
    return row_dim


def _padded(x, pad, *_):
    at = 2 * (x.ndim - 1 - x.row_dim)  # `pad` has two numbers a dimension, from the last one on
    require(not any(pad[at : at + 2]), "it works along the rows")
    return x.row_dim


def _embedded(grad, index, num_weights, padding_idx, scale_grad_by_freq):
    require(not scale_grad_by_freq, "frequencies are counted over the batch")  # also where the gradient is zero
    require(grad.row_dim < index.ndim == grad.ndim - 1, "rows are features")


def _batch_norm(grad, train):
    require(not train, "batch norm in training mode mixes the rows")  # with fixed statistics it is elementwise
    other_dim(grad, 1)
    return grad.row_dim, None, None


def _masked_softmax(grad, out, mask, dim=-1):
    require(mask.shape == grad.shape, "the mask is broadcast")
    return apart(1)(grad, -1 if dim is None else dim)


def _nll_loss(grad, x, target, weight, reduction, *_):
    loss(grad, reduction, target)
    return first(grad)  # `x` has its classes in dimension 1, where `grad` may have pixels


# What follows has a line an op, however long.
# fmt: off
TABLE: dict[str, tuple[Any, ...]] = {
    # views
    "alias detach lift_fresh view_as_real": ("grad", same),
    "view_as_complex": ("grad", before_last(1)),
    "t transpose.int": ("grad", transposed),
    "permute": ("grad", _permuted),
    "expand": ("grad size", lambda x, size, **_: x.row_dim + len(size) - x.ndim),
    "unsqueeze": ("grad", lambda x, dim: inserted(x, x.ndim + 1, dim)),
    "squeeze squeeze.dim squeeze.dims": ("grad", squeezed),
    "select.int unbind.int": ("grad", selected),
    "split.Tensor split_with_sizes unsafe_split.Tensor unsafe_split_with_sizes": ("grad", apart(2)),
    "slice.Tensor": ("grad", lambda x, *place: sliced(x, x.shape, *place)),
    "unfold": ("grad", apart(1)),
    # pieces
    "select_backward": ("grad size", lambda grad, size, dim, index: inserted(grad, len(size), dim)),
    "slice_backward": ("grad size", sliced),
    "unfold_backward": ("grad size", _unfolded),
    "slice_scatter": ("grad grad", lambda x, source, *place: sliced(x, x.shape, *place)),
    "index_select": ("grad", apart(1)),
    "index_add index_copy": ("grad . . grad", apart(1)),
    "gather": ("grad . saved", apart(1)),
    "scatter_add scatter.src scatter.value": ("grad . saved grad", apart(1)),
    "embedding": (". saved", lambda weight, index, *_: index.row_dim),
    "embedding_dense_backward": ("grad saved", _embedded),
    # entries change places
    "flip rev": ("grad", apart(1)),
    "roll": ("grad", _rolled),
    "repeat": ("grad", _repeated),
    "constant_pad_nd": ("grad . grad", _padded),  # zero where the number is, too
    "tril triu": ("grad", before_last(2)),
    "pixel_shuffle pixel_unshuffle channel_shuffle": ("grad", before_last(3)),
    "im2col": ("grad", lambda x, *_: first(x, 4)),
    "col2im": ("grad", lambda x, *_: first(x, 3)),
    "empty_like zeros_like ones_like full_like": ("saved", same),  # of gradients: `factory` in `pointwise.py`
    # reductions, and along a dimension
    "sum sum.dim_IntList any any.dim any.dims": ("grad", summed),
    "mean mean.dim amax amin": ("grad", reduced),
    "all all.dim all.dims prod prod.dim_int argmax argmin logsumexp max.dim min.dim": ("saved", reduced),
    "var.correction std.correction var_mean.correction std_mean.correction": ("saved", reduced),
    "linalg_vector_norm": ("saved", lambda x, ord=2, *dims, **options: reduced(x, *dims, **options)),
    "cumsum _fft_c2c _fft_r2c _fft_c2r": ("grad", apart(1)),
    "_softmax _log_softmax _safe_softmax glu sort": ("saved", apart(1, default=-1)),
    "cumprod logcumsumexp cummax cummin": ("saved", apart(1)),
    "topk": ("saved", apart(2, default=-1)),
    "_softmax_backward_data _log_softmax_backward_data glu_backward": ("grad saved", apart(2)),
    "_masked_softmax_backward": ("grad saved saved", _masked_softmax),
    # losses and activation functions
    "nll_loss_backward nll_loss2d_backward": ("grad saved saved", _nll_loss),
    "mse_loss_backward smooth_l1_loss_backward huber_loss_backward": (
        "grad saved saved", lambda grad, x, target, reduction, *_: loss(grad, reduction, x, target)
    ),
    "binary_cross_entropy_backward": (
        "grad saved saved shared", lambda grad, x, target, weight=None, reduction=1: loss(grad, reduction, x, target)
    ),
    # It counts lengths of samples, and the gradient of `[T, B, C]` is of losses `[B]`.
    "_ctc_loss_backward _ctc_loss_backward.Tensor": ("grad", lambda grad, *_: 1 + first(grad, 1), always),
    "_prelu_kernel_backward": ("grad saved shared", lambda grad, x, weight: loss(grad, 0, x)),
    # norms
    "native_layer_norm _fused_rms_norm": ("saved", lambda x, shape, *_: before_last(len(shape))(x)),
    "native_layer_norm_backward": (
        "grad saved . saved saved", lambda grad, x, shape, *_: (before_last(len(shape))(grad), None, None)
    ),
    "_fused_rms_norm_backward": (
        "grad saved . saved", lambda grad, x, shape, *_: (before_last(len(shape))(grad), None)
    ),
    "native_group_norm": ("saved . . size", lambda x, *_: first(x)),
    "native_group_norm_backward": ("grad saved saved saved . size", lambda grad, *_: (first(grad), None, None)),
    "native_batch_norm_backward": ("grad saved", lambda grad, *args: _batch_norm(grad, train=args[6])),
    # layers
    "convolution": ("saved", lambda x, weight, *_: first(x, weight.ndim)),
    "convolution_backward": ("grad saved", lambda grad, x, weight, *_: (first(grad, weight.ndim), None, None)),
    "_low_memory_max_pool_offsets_to_indices": ("saved", lambda x, *_: first(x)),
    **{
        ops.replace("N", str(n)): (operands, before_last(n))  # samples or channels, which are treated alike
        for ops, operands in {
            "max_poolNd_with_indices_backward": "grad saved . . . . . saved",
            "adaptive_max_poolNd_backward": "grad saved saved",
            "avg_poolNd_backward _adaptive_avg_poolNd_backward": "grad saved",
            "reflection_padNd_backward replication_padNd_backward": "grad saved",
        }.items()
        for n in (1, 2, 3)
    },
    **{
        f"upsample_{kind}_backward _upsample_{kind}_backward": ("grad . size", lambda grad, *_: first(grad))
        for kind in (
            "nearest1d", "nearest2d", "nearest3d", "nearest_exact1d", "nearest_exact2d", "nearest_exact3d", "linear1d",
            "bilinear2d", "bilinear2d_aa", "bicubic2d", "bicubic2d_aa", "trilinear3d",
        )
    },
    # attention
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention": (
        "saved saved saved attn_mask=shared", lambda query, *_, **__: (attention(query), 0), drops(3)
    ),
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention": (
        "saved saved saved shared", lambda query, *_, **__: (attention(query), 0), drops(5)
    ),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        "grad saved saved saved saved saved attn_mask=shared", lambda grad, *_, **__: attention(grad), drops(6)
    ),
    "_scaled_dot_product_flash_attention_backward": (
        "grad saved saved saved saved saved", lambda *args, **_: attention(args[0], *args[6:8]), drops(10)
    ),
    "_scaled_dot_product_efficient_attention_backward": (
        "grad saved saved saved shared saved saved",
        lambda *args, **_: attention(args[0], bias=args[4] if args[10][3] else None), drops(9)
    ),
    "_scaled_dot_product_cudnn_attention_backward": (
        "grad saved saved saved saved saved . . shared", lambda *args, **_: attention(args[0], *args[9:11]), drops(13)
    ),
}
# fmt: on

FACTS = {op: Fact(*line) for ops, line in TABLE.items() for op in ops.split()}
