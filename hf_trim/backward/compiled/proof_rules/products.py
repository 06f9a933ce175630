"""
Proof rules of matrix products.

Example: the backward pass of a linear layer multiplies a gradient `[s0*5, 16]` (B·T, C), zero outside of the kept
rows.

| op | result | rows |
|---|---|---|
| `mm(grad, weight)` | `[s0*5, 16]` | dimension 0, inner 5 |
| `mm(grad.T, input)`, `[16, s0*5] @ [s0*5, 16]` | `[16, 16]` | none: a sum over the rows |
| `mm(grad, grad.T)`, `[s0*5, 16] @ [16, s0*5]` | `[s0*5, s0*5]` | refused: each row meets each row |
"""

from hf_trim.backward.compiled.proof_rules.pointwise import pointwise
from hf_trim.backward.compiled.values import Value, check_same_dim, check_sum_over_rows
from hf_trim.backward.facts.fact import product_dims
from hf_trim.backward.registry import PROOF, implements


def _multiply(prop, shape, a: Value, b: Value) -> Value:
    """The product `[..., M, K] @ [..., K, N]`."""
    zeros = max(a.zeros, b.zeros)
    if a.row_dim is None and b.row_dim is None:
        return prop.result(shape, zeros=zeros)
    *dims, dim = product_dims(a, b)
    check_same_dim([(a.row_dim, b.row_dim), tuple(dims)])
    if dim is None:
        check_sum_over_rows(zeros)
    return prop.result(shape, dim, prop.common_layout([a, b]), zeros)


@implements("mm", "bmm", table=PROOF)
def _mm(prop, name, shape, a, b, *args, **kwargs):
    return _multiply(prop, shape, a, b)


@implements("addmm", "baddbmm", table=PROOF)
def _addmm(prop, name, shape, bias, a, b, *, beta=1, alpha=1):
    return pointwise(prop, "add", shape, bias, _multiply(prop, shape, a, b))
