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

from hf_trim.backward.compiled.errors import RowsMixedError
from hf_trim.backward.compiled.proof_rules.pointwise import pointwise
from hf_trim.backward.compiled.values import Value, check_sum_over_rows
from hf_trim.backward.registry import PROOF, implements


def _multiply(prop, shape, a: Value, b: Value) -> Value:
    """The product `[..., M, K] @ [..., K, N]`."""
    last, zeros = len(shape) - 1, max(a.zeros, b.zeros)
    if a.dim is None and b.dim is None:
        return prop.result(shape, zeros=zeros)
    layout = prop.common_layout([a, b])
    if a.dim == last and b.dim == last - 1:
        check_sum_over_rows(zeros)
        return prop.result(shape, zeros=zeros)
    batched = last > 1 and a.dim == b.dim == 0
    if batched or (b.dim is None and a.dim == last - 1):
        return prop.result(shape, a.dim, layout, zeros)
    if a.dim is None and b.dim == last:
        return prop.result(shape, b.dim, layout, zeros)
    raise RowsMixedError("its operands carry rows in different dimensions")


@implements("mm", "bmm", table=PROOF)
def _mm(prop, name, shape, a, b, *args, **kwargs):
    return _multiply(prop, shape, a, b)


@implements("addmm", "baddbmm", table=PROOF)
def _addmm(prop, name, shape, bias, a, b, *, beta=1, alpha=1):
    return pointwise(prop, "add", shape, bias, _multiply(prop, shape, a, b))
