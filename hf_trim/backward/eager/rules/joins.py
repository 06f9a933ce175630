"""
Joining tensors.

e.g. `cat([grad, grad * 2], 1)` of `[B, T, C]`, B = 4, rows 1 and 3 kept: the payloads `[2, T, C]` are joined along T.
Along B the rows would be renumbered: that runs dense. So does joining a tensor that is not zero outside the kept rows.
"""

import torch

from hf_trim.backward.eager.rules.operands import find_reference, is_zeros
from hf_trim.backward.eager.tensor import RowSparseTensor, RowTensor
from hf_trim.backward.facts.fact import other_dim
from hf_trim.backward.registry import ACTIVATIONS, GRADIENTS, implements, require


aten = torch.ops.aten


def reference(tensors) -> RowTensor:
    """One of the tensors to join. If there is a gradient, all must be zero outside the kept rows."""
    is_gradient = any(isinstance(x, RowSparseTensor) for x in tensors)
    require(not is_gradient or all(map(is_zeros, tensors)), "a dense tensor is joined")
    return find_reference(tensors, RowSparseTensor if is_gradient else RowTensor)


@implements("cat", table=(GRADIENTS, ACTIVATIONS))
def cat(func, tensors, dim=0):
    ref = reference(tensors)
    dim = other_dim(ref, dim)
    return ref.like(func([ref.kept_rows(x) for x in tensors], dim))


@implements("stack", table=(GRADIENTS, ACTIVATIONS))
def stack(func, tensors, dim=0):
    ref = reference(tensors)
    dim %= ref.ndim + 1
    return ref.like(func([ref.kept_rows(x) for x in tensors], dim), ref.row_dim + (dim <= ref.row_dim))


@implements("select_scatter")
def select_scatter(func, x, source, dim, index):
    dim = other_dim(x, dim) if isinstance(x, RowTensor) else dim
    return aten.slice_scatter(x, source.unsqueeze(dim), dim, index, index + 1 or None)
