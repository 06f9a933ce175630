"""Formulas of the backward pass compute with the kept rows of what was saved, not with all of it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_trim.backward.eager.saved import COMPUTE_WITH_SAVED
from hf_trim.backward.eager.sparse import take_rows_sparse
from tests.support.rule_cases import KEPT, close, slice_small_tensors  # noqa: F401


class WholeBatch(TorchDispatchMode):
    """The ops that ran on ordinary tensors of a whole batch."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.ops = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not types and any(isinstance(x, torch.Tensor) and x.shape == self.shape for x in args):
            self.ops.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


COMPUTE_FIRST = {
    "Abs": torch.abs, "Acos": torch.acos, "Asin": torch.asin, "Asinh": torch.asinh, "Atan": torch.atan,
    "Clamp": lambda x: x.clamp(0.1, 0.5), "ClampMax": lambda x: x.clamp_max(0.5), "ClampMin": lambda x: x.clamp(0.1),
    "Cos": torch.cos, "Cosh": torch.cosh, "Div": lambda x: x / x, "Erf": torch.erf, "Erfc": torch.erfc,
    "Expm1": torch.expm1, "Log1P": torch.log1p, "Log2": torch.log2, "Log10": torch.log10, "Pow": lambda x: x**3,
    "Reciprocal": torch.reciprocal, "Rsqrt": torch.rsqrt, "Sin": torch.sin, "Sinh": torch.sinh, "Sqrt": torch.sqrt,
    "Tan": torch.tan, "Xlogy": lambda x: torch.xlogy(x, x), "Pow of tensors": lambda x: x**x,
    "Std": lambda x: x.std(1, keepdim=True), "StdMean": lambda x: sum(torch.std_mean(x, 2, keepdim=True)),
    "Var": lambda x: x.var((1, 2), keepdim=True), "VarMean": lambda x: sum(torch.var_mean(x, 1, keepdim=True)),
    "LinalgVectorNorm": lambda x: x.norm(dim=2, keepdim=True),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTE_FIRST)
def test_formulas_compute_with_the_kept_rows_of_what_was_saved(name):
    x = torch.rand(6, 3, 4, requires_grad=True)
    loss = take_rows_sparse(COMPUTE_FIRST[name](x * 1).sum((1, 2)), KEPT).sum()  # gradients of a leaf are dense
    with WholeBatch(x.shape) as batch_sized:
        loss.backward()
    assert set(batch_sized.ops) <= {"index_select", "detach", "zero_", "index_copy_"}, batch_sized.ops


def test_each_formula_is_tested():
    names = {f"{name.split()[0]}Backward{number}" for name in COMPUTE_FIRST for number in (0, 1)}
    assert names == COMPUTE_WITH_SAVED


def test_a_saved_tensor_serves_several_selections_and_a_plain_loss():
    x = torch.rand(6, 3, requires_grad=True)
    powers = x**3
    for kept in (KEPT, torch.tensor([0, 1, 5]), None):
        x.grad = None
        total = powers.sum(1)
        (total if kept is None else take_rows_sparse(total, kept)).sum().backward(retain_graph=True)
        expected = torch.zeros(6, 3).index_copy(0, kept, 3 * x.detach()[kept] ** 2) if kept is not None else 3 * x**2
        close(x.grad, expected.detach())


@pytest.mark.parametrize("changed_first", [True, False])
def test_a_saved_tensor_that_was_changed_is_an_error(changed_first):
    x = torch.rand(6, 3, requires_grad=True) * 2
    total = (x**3).sum(1)
    if changed_first:
        x.detach().add_(1)
    loss = take_rows_sparse(total, KEPT).sum()
    if not changed_first:
        x.detach().add_(1)
    with pytest.raises(RuntimeError, match="in.?place operation"):
        loss.backward()


def test_tensors_saved_with_hooks_of_others_stay_theirs():
    x = torch.rand(6, 3, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        total = (x**3).sum(1)
    take_rows_sparse(total, KEPT).sum().backward()
    close(x.grad[KEPT], 3 * x.detach()[KEPT] ** 2)
