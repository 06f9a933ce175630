"""
Joining tensors, and moving or masking entries within each row.

e.g. `cat([grad, grad * 2], 1)` of `[B, T, C]`, B = 4, rows 1 and 3 kept: the payloads `[2, T, C]` are joined along T.
Along B the rows would be renumbered: that runs dense. So does joining a tensor that is not zero outside the kept rows.
"""

from hf_trim.backward.eager.rules.operands import find_reference, is_zeros, require, require_other_dim
from hf_trim.backward.eager.tensor import RowSparseTensor, RowTensor
from hf_trim.backward.registry import ACTIVATIONS, GRADIENTS, implements


def reference(tensors) -> RowTensor:
    """One of the tensors to join. If there is a gradient, all must be zero outside the kept rows."""
    is_gradient = any(isinstance(x, RowSparseTensor) for x in tensors)
    require(not is_gradient or all(map(is_zeros, tensors)), "a dense tensor is joined")
    return find_reference(tensors, RowSparseTensor if is_gradient else RowTensor)


@implements("cat", table=(GRADIENTS, ACTIVATIONS))
def cat(func, tensors, dim=0):
    ref = reference(tensors)
    dim = require_other_dim(ref, dim)
    return ref.like(func([ref.kept_rows(x) for x in tensors], dim))


@implements("stack", table=(GRADIENTS, ACTIVATIONS))
def stack(func, tensors, dim=0):
    ref = reference(tensors)
    dim %= ref.ndim + 1
    return ref.like(func([ref.kept_rows(x) for x in tensors], dim), ref.row_dim + (dim <= ref.row_dim))


@implements("roll", table=(GRADIENTS, ACTIVATIONS))
def roll(func, x, shifts, dims=()):
    require(len(dims) > 0, "it works along the rows")
    return x.like(func(x.payload, shifts, [require_other_dim(x, d) for d in dims]))


@implements("flip", table=(GRADIENTS, ACTIVATIONS))
def flip(func, x, dims):
    return x.like(func(x.payload, [require_other_dim(x, d) for d in dims]))


@implements("constant_pad_nd", table=(GRADIENTS, ACTIVATIONS))
def constant_pad(func, x, pad, value=0):
    first = 2 * (x.ndim - 1 - x.row_dim)  # `pad` has two numbers a dimension, from the last one on
    require(value == 0 and not any(pad[first : first + 2]), "it works along the rows")
    return x.like(func(x.payload, pad, value))


@implements("tril", "triu", table=(GRADIENTS, ACTIVATIONS))
def triangle(func, x, diagonal=0):
    require(x.row_dim < x.ndim - 2, "it works along the rows")
    return x.like(func(x.payload, diagonal))
