"""
The first gradients on the kept rows, beside the dense ones.

The proof is right if its rules are right, and if the compiler used no size that its guards do not mention. The
comparison is the last line of defence against both.

Example: a graph returns the gradient of a weight, `[C, C]`, and of its input, `[B, C]`. With 2 of 4 rows kept, the
second one comes back as a row-sparse tensor of 2 rows. It is densified to `[4, C]`, and the difference to the dense
gradients is taken over both tensors together.
"""

import math

import torch
from torch import Tensor

from hf_trim.backward.eager.tensor import densify


# Relative difference that rounding may explain, over all outputs of a graph. Mixed-up rows make one of about 1.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def relative_difference(grads: list, dense: list) -> float | None:
    """
    Args:
        grads (`list`): Gradients that a graph returned for the kept rows: tensors, row-sparse or not, or `None`.
        dense (`list`): What it returned for the whole batch.

    Returns:
        `float`: Norm of the difference over norm of the dense gradients; `None` if those are zero or not finite, so
        that nothing can be said.
    """
    pairs = [
        (densify(a), b)
        for a, b in zip(grads, dense, strict=True)
        if isinstance(b, Tensor) and b.is_floating_point() and b.numel()
    ]
    error = sum(float(torch.linalg.vector_norm((a - b).float())) ** 2 for a, b in pairs) ** 0.5
    norm = sum(float(torch.linalg.vector_norm(b.float())) ** 2 for _, b in pairs) ** 0.5
    return error / norm if norm and math.isfinite(norm) else None


def tolerance(tensors: list) -> float:
    """The difference that is allowed where these tensors take part: that of the least precise dtype among them."""
    return max(_TOLERANCE.get(x.dtype, 0) for x in tensors if isinstance(x, Tensor))
