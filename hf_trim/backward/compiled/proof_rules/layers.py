"""
Proof rules of whole layers that are one op: attention, convolution, norms, losses, pooling.

Example: `convolution_backward(grad, x, weight)` with a gradient `[s0, 8, 6, 6]` that is zero outside of the kept rows
returns the gradient of the images, `[s0, 3, 8, 8]`, with rows in dimension 0, and those of weight and bias,
`[8, 3, 3, 3]` and `[8]`, which are sums over the rows. Most of these ops take the first dimension for the batch, so
rows must be there.
"""

from hf_trim.backward.compiled.errors import RowsMixedError
from hf_trim.backward.compiled.proof_rules.pointwise import pointwise
from hf_trim.backward.compiled.values import (
    Value,
    Zeros,
    check_batch_first,
    check_no_rows,
    check_sum_over_rows,
    values_in,
)
from hf_trim.backward.registry import PROOF, implements


def _attention_result(prop, name, shape, zeros) -> Value:
    """A result `[B, ...]`. Others, such as a kernel's random state, must not be used by any op."""
    if prop.row_dims(shape) != [0]:
        return Value(shape, unknown=f"{name}: a result that has no rows is used")
    return prop.batch_first_result(shape, zeros)


def _batch_first_and_parameters(prop, shapes, grad) -> list:
    """The gradients that a layer's backward returns: of its input, `[B, ...]`, and of parameters: sums over rows."""
    check_sum_over_rows(grad.zeros)
    return [
        prop.batch_first_result(shape, grad.zeros) if i == 0 and shape else prop.result(shape, zeros=grad.zeros)
        for i, shape in enumerate(shapes)
    ]


@implements(
    "_scaled_dot_product_flash_attention_for_cpu_backward", "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_efficient_attention_backward", "_scaled_dot_product_cudnn_attention_backward",
    table=PROOF,
)  # fmt: skip
def _attention_backward(prop, name, shapes, grad, query, key, value, *args, **kwargs):
    # A kernel draws its masks by the position in the batch, so that kept rows would get other masks. The dropout rate
    # is the only float among its arguments by position.
    if next(x for x in args if isinstance(x, float)) != 0:
        raise RowsMixedError("the attention kernel has dropout inside")
    carriers = [x for x in values_in((grad, query, key, value, args, kwargs)) if x.dim is not None]
    check_batch_first(grad, query, key, value, *carriers)
    needs_gradient = next((x for x in args if isinstance(x, (list, tuple))), None)  # query, key, value, bias
    if needs_gradient is not None and len(needs_gradient) > 3 and needs_gradient[3]:
        raise RowsMixedError("it returns the gradient of a bias")
    return [_attention_result(prop, name, shape, grad.zeros) for shape in shapes]


@implements("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
      "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention", table=PROOF)  # fmt: skip
def _attention(prop, name, shapes, query, key, value, *args, **kwargs):
    dropout = [x for x in (*args, kwargs.get("dropout_p", 0.0)) if isinstance(x, float)]
    if any(dropout):
        raise RowsMixedError("the attention kernel has dropout inside")
    check_batch_first(query, key, value, *(x for x in values_in((args, kwargs)) if x.dim is not None))
    return [_attention_result(prop, name, shape, Zeros.UNKNOWN) for shape in shapes]


@implements("convolution", table=PROOF)
def _convolution(prop, name, shape, x, weight, bias, *args):
    check_no_rows(weight, bias)
    check_batch_first(x)
    return prop.batch_first_result(shape)


@implements("convolution_backward", table=PROOF)
def _convolution_backward(prop, name, shapes, grad, x, weight, bias_sizes, *args):
    check_no_rows(weight)
    check_batch_first(grad, x)
    return _batch_first_and_parameters(prop, shapes, grad)


@implements("native_layer_norm_backward", "_fused_rms_norm_backward", table=PROOF)
def _norm_backward(prop, name, shapes, grad, x, normalized, *operands):
    first_normalized = len(grad.shape) - len(normalized)
    carriers = [value for value in (grad, x, *values_in(operands)) if value.dim is not None]
    if any(value.dim >= first_normalized or value.dim != grad.dim for value in carriers):
        raise RowsMixedError("it normalizes over the rows")
    check_sum_over_rows(grad.zeros)
    return [
        prop.result(shape, grad.dim if i == 0 and shape else None, prop.common_layout(carriers), grad.zeros)
        for i, shape in enumerate(shapes)
    ]


@implements("native_layer_norm", table=PROOF)
def _norm(prop, name, shapes, x, normalized, *operands):
    check_no_rows(*operands)
    if x.dim is not None and x.dim >= len(x.shape) - len(normalized):
        raise RowsMixedError("it normalizes over the rows")
    return [prop.result(shape, x.dim, x) for shape in shapes]


@implements("native_group_norm_backward", table=PROOF)
def _group_norm_backward(prop, name, shapes, grad, x, mean, rstd, weight, *sizes):
    check_no_rows(weight)
    check_batch_first(grad, x, mean, rstd)
    return _batch_first_and_parameters(prop, shapes, grad)


@implements("native_group_norm", table=PROOF)
def _group_norm(prop, name, shapes, x, weight, bias, *sizes):
    check_no_rows(weight, bias)
    check_batch_first(x)
    return [prop.batch_first_result(shape) for shape in shapes]


@implements("native_batch_norm_backward", table=PROOF)
def _batch_norm_backward(prop, name, shapes, grad, x, weight, mean, variance, saved_mean, saved_rstd, train, *args):
    if train:
        raise RowsMixedError("batch norm in training mode mixes the rows")
    check_no_rows(weight, mean, variance, saved_mean, saved_rstd)
    check_batch_first(grad, x)
    return _batch_first_and_parameters(prop, shapes, grad)


@implements("nll_loss_backward", "nll_loss2d_backward", "mse_loss_backward", "smooth_l1_loss_backward",
      "huber_loss_backward", "binary_cross_entropy_backward", table=PROOF)  # fmt: skip
def _loss_backward(prop, name, shape, grad, x, target, *args):
    if grad.zeros == Zeros.EVERYWHERE:  # the loss is not used
        return pointwise(prop, "mul", shape, grad, x)
    reduction = next(arg for arg in args if isinstance(arg, int))
    if reduction != 0:  # 0 is "none"
        raise RowsMixedError("it computes a value from all rows together")
    check_batch_first(grad, x, target)
    check_no_rows(*args)
    return prop.batch_first_result(shape, grad.zeros)


@implements("max_pool2d_with_indices_backward", "avg_pool2d_backward", "_adaptive_avg_pool2d_backward",
      "adaptive_max_pool2d_backward", table=PROOF)  # fmt: skip
def _pool_backward(prop, name, shape, grad, x, *args):
    check_batch_first(grad, x, *values_in(args))
    return prop.batch_first_result(shape, grad.zeros)


@implements("_low_memory_max_pool_offsets_to_indices", table=PROOF)
def _pool_indices(prop, name, shape, offsets, *args):
    check_batch_first(offsets)
    return prop.batch_first_result(shape)
