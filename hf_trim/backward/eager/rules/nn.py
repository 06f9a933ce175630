"""
Neural-network ops: norms, softmax, losses, convolution, pooling, resampling, embeddings.

e.g. `convolution_backward` of images `[B, C, H, W]`, B = 4, rows 1 and 3 kept: it runs on the payload `[2, C, H, W]`
and the kept rows of the input. The gradient of the input is row-sparse. Those of weight and bias are sums over the
samples, to which the rows that are zero add nothing: ordinary tensors.
"""

import torch

from hf_trim.backward._torch_internals import op_name
from hf_trim.backward.eager.rules.operands import require, require_other_dim, require_row_sparse, wrap_outputs
from hf_trim.backward.registry import ACTIVATIONS, GRADIENTS, implements


# ---- norms -------------------------------------------------------------------------------------------------------


# Gradients of weights and biases (`out[1:]`) are sums over rows, complete without the rows that are zero.


@implements("native_layer_norm_backward")
def layer_norm_backward(func, grad, x, normalized_shape, mean, rstd, weight, bias, output_mask):
    require(require_row_sparse(grad).row_dim < grad.ndim - len(normalized_shape), "rows are normalized")
    mean, rstd = grad.kept_rows(mean), grad.kept_rows(rstd)
    out = func(grad.payload, grad.kept_rows(x), normalized_shape, mean, rstd, weight, bias, output_mask)
    return *wrap_outputs(grad, out[:1]), *out[1:]


@implements("_fused_rms_norm_backward")
def rms_norm_backward(func, grad, x, normalized_shape, rstd, weight, output_mask):
    require(require_row_sparse(grad).row_dim < grad.ndim - len(normalized_shape), "rows are normalized")
    out = func(grad.payload, grad.kept_rows(x), normalized_shape, grad.kept_rows(rstd), weight, output_mask)
    return *wrap_outputs(grad, out[:1]), *out[1:]


@implements("native_group_norm_backward")
def group_norm_backward(func, grad, x, mean, rstd, weight, N, C, HxW, group, output_mask):
    require(require_row_sparse(grad).row_dim == 0 and N == grad.shape[0], "rows are normalized")
    mean, rstd = grad.kept_rows(mean), grad.kept_rows(rstd)
    kept = grad.payload.shape[0]
    out = func(grad.payload, grad.kept_rows(x), mean, rstd, weight, kept, C, HxW, group, output_mask)
    return *wrap_outputs(grad, out[:1]), *out[1:]


@implements("native_batch_norm_backward")
def batch_norm_backward(func, grad, x, weight, running_mean, running_var, mean, invstd, train, eps, output_mask):
    require(not train, "batch norm in training mode mixes samples")  # with fixed statistics it is elementwise
    require(require_row_sparse(grad).row_dim != 1, "rows are channels")
    statistics = (running_mean, running_var, mean, invstd)
    out = func(grad.payload, grad.kept_rows(x), weight, *statistics, train, eps, output_mask)
    return *wrap_outputs(grad, out[:1]), *out[1:]


# ---- softmax and losses ------------------------------------------------------------------------------------------


@implements("_softmax_backward_data", "_log_softmax_backward_data")
def softmax_backward(func, grad, out, dim, input_dtype):
    require_other_dim(require_row_sparse(grad), dim)
    return grad.like(func(grad.payload, grad.kept_rows(out), dim, input_dtype))


@implements("_masked_softmax_backward")
def masked_softmax_backward(func, grad, out, mask, dim=None):
    require_other_dim(require_row_sparse(grad), grad.ndim - 1 if dim is None else dim)
    require(mask.shape == grad.shape, "the mask is broadcast")
    return grad.like(func(grad.payload, grad.kept_rows(out), grad.kept_rows(mask), dim))


@implements("glu_backward")
def glu_backward(func, grad, x, dim):
    require_other_dim(require_row_sparse(grad), dim)
    return grad.like(func(grad.payload, grad.kept_rows(x), dim))


@implements("nll_loss_backward", "nll_loss2d_backward")
def nll_loss_backward(func, grad, x, target, weight, reduction, ignore_index, total_weight):
    require(
        reduction == 0 and require_row_sparse(grad).row_dim == 0 and target.ndim == grad.ndim, "the loss is reduced"
    )
    args = (grad.kept_rows(x), grad.kept_rows(target), weight, reduction, ignore_index, total_weight)
    return grad.like(func(grad.payload, *args))


@implements("mse_loss_backward")
def mse_loss_backward(func, grad, x, target, reduction):
    require(reduction == 0 and require_row_sparse(grad).shape == x.shape == target.shape, "the loss is reduced")
    return grad.like(func(grad.payload, grad.kept_rows(x), grad.kept_rows(target), reduction))


@implements("smooth_l1_loss_backward", "huber_loss_backward")
def smooth_l1_loss_backward(func, grad, x, target, reduction, scale):
    require(reduction == 0 and require_row_sparse(grad).shape == x.shape == target.shape, "the loss is reduced")
    return grad.like(func(grad.payload, grad.kept_rows(x), grad.kept_rows(target), reduction, scale))


@implements("binary_cross_entropy_backward")
def binary_cross_entropy_backward(func, grad, x, target, weight=None, reduction=1):
    require(reduction == 0 and require_row_sparse(grad).shape == x.shape == target.shape, "the loss is reduced")
    weight = None if weight is None else grad.kept_rows_or_broadcast(weight, grad.row_dim - grad.ndim)
    return grad.like(func(grad.payload, grad.kept_rows(x), grad.kept_rows(target), weight, reduction))


# ---- convolution, pooling, resampling ----------------------------------------------------------------------------


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
    require(grad.row_dim == 0 and grad.ndim == weight.ndim, "rows are not samples")
    values, x = grad.payload, grad.kept_rows(x)
    if x.device.type == "cpu" and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        values = values.contiguous(memory_format=torch.channels_last)  # oneDNN is slow on mixed layouts
    out = func(values, x, weight, bias_sizes, *args)
    return *wrap_outputs(grad, out[:1]), *out[1:]


def check_spatial_rows(func, grad, x):
    """Rows must be samples or channels, which pooling and padding treat alike."""
    spatial = next(n for n in (1, 2, 3) if f"{n}d" in op_name(func))
    require(require_row_sparse(grad).ndim == x.ndim and grad.row_dim < x.ndim - spatial, "rows are not samples")


@implements("max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward")
def max_pool_backward(func, grad, x, kernel_size, stride, padding, dilation, ceil_mode, indices):
    check_spatial_rows(func, grad, x)
    x, indices = grad.kept_rows(x), grad.kept_rows(indices)
    return grad.like(func(grad.payload, x, kernel_size, stride, padding, dilation, ceil_mode, indices))


@implements("avg_pool2d_backward", "avg_pool3d_backward")
@implements("_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward")
@implements("reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward")
@implements("replication_pad1d_backward", "replication_pad2d_backward", "replication_pad3d_backward")
def pool_backward(func, grad, x, *args):
    check_spatial_rows(func, grad, x)
    return grad.like(func(grad.payload, grad.kept_rows(x), *args))


@implements("adaptive_max_pool2d_backward", "adaptive_max_pool3d_backward")
def adaptive_max_pool_backward(func, grad, x, indices):
    check_spatial_rows(func, grad, x)
    return grad.like(func(grad.payload, grad.kept_rows(x), grad.kept_rows(indices)))


@implements(
    *(f"upsample_{kind}_backward" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d")),
    *(f"upsample_{kind}_backward" for kind in ("bicubic2d", "trilinear3d")),
    *(f"_upsample_{kind}_backward" for kind in ("nearest_exact1d", "nearest_exact2d", "nearest_exact3d")),
    *(f"_upsample_{kind}_backward" for kind in ("bilinear2d_aa", "bicubic2d_aa")),
)
def upsample_backward(func, grad, output_size, input_size, *args):
    require(require_row_sparse(grad).row_dim == 0 and input_size[0] == grad.shape[0], "rows are not samples")
    return grad.like(func(grad.payload, output_size, [grad.payload.shape[0], *input_size[1:]], *args))


@implements("_fft_c2c", "_fft_r2c", "_fft_c2r", table=(GRADIENTS, ACTIVATIONS))
def fourier_transform(func, x, dims, *args):
    return x.like(func(x.payload, [require_other_dim(x, dim) for dim in dims], *args))


@implements("im2col", "col2im", table=(GRADIENTS, ACTIVATIONS))
def columns(func, x, *args):
    with_batch = 4 if op_name(func) == "im2col" else 3
    require(x.row_dim == 0 and x.ndim == with_batch, "rows are not samples")
    return x.like(func(x.payload, *args))


@implements("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", table=(GRADIENTS, ACTIVATIONS))
def shuffle(func, x, factor):
    require(x.row_dim < x.ndim - 3, "rows are not samples")
    return x.like(func(x.payload, factor))


# ---- embeddings --------------------------------------------------------------------------------------------------


@implements("embedding_dense_backward")
def embedding_backward(func, grad, indices, num_weights, padding_idx, scale_grad_by_freq):
    require(not scale_grad_by_freq, "frequencies are counted over the batch")  # also where the gradient is zero
    require(require_row_sparse(grad).row_dim < indices.ndim == grad.ndim - 1, "rows are features")
    return func(grad.payload, grad.kept_rows(indices), num_weights, padding_idx, scale_grad_by_freq)
