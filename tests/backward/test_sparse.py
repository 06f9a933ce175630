"""What the row-sparse backward pass promises to whatever meets its gradients: hooks, Functions, compiled graphs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_trim.backward.eager.sparse import take_rows_sparse
from hf_trim.backward.eager.tensor import RowSparseTensor
from hf_trim.backward.settings import fallback_report, reset_fallbacks, strict
from tests.support.rule_cases import KEPT, close, slice_small_tensors  # noqa: F401


@pytest.fixture
def losses():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(6, 3, requires_grad=True)
    hidden = net(x)
    return net, x, hidden, F.cross_entropy(hidden, torch.tensor([0, 1] * 3), reduction="none")


def test_backward_hooks_and_retained_gradients_see_a_tensor(losses):
    net, x, hidden, values = losses
    (expected,) = torch.autograd.grad(values[KEPT].sum(), hidden, retain_graph=True)
    seen = []
    hidden.retain_grad()
    hidden.register_hook(lambda grad: seen.append(grad.norm().item()))
    hidden.register_hook(lambda grad: grad * 1)
    x.register_hook(lambda grad: seen.append(grad.abs().max()))
    take_rows_sparse(values, KEPT).sum().backward()
    close(hidden.grad, expected)
    assert len(seen) == 2 and seen[0] == pytest.approx(expected.norm().item())
    assert hidden.grad.numpy().shape == (6, 2) and len(hidden.grad.tolist()) == 6
    close(copy.deepcopy(hidden.grad), expected)
    assert "kept=2" in repr(hidden.grad)
    assert type(x.grad) is torch.Tensor


def test_double_backward(losses):
    net, x, _, values = losses
    weights = list(net.parameters())
    penalty = []
    for kept in (values[KEPT], take_rows_sparse(values, KEPT)):
        (grad,) = torch.autograd.grad(kept.sum(), x, create_graph=True)
        penalty.append(torch.autograd.grad(grad.square().sum(), weights[0], retain_graph=True)[0])
    close(*penalty)


def test_anomaly_mode(losses):
    net, x, _, values = losses
    with torch.autograd.set_detect_anomaly(True):
        take_rows_sparse(values, KEPT).sum().backward()
    assert type(x.grad) is torch.Tensor


def test_several_selections_and_a_plain_loss(losses):
    net, x, hidden, values = losses
    second_kept = torch.tensor([0, 1, 5])
    (expected,) = torch.autograd.grad(
        values[KEPT].sum() + values[second_kept].mean() + hidden.square().mean(), x, retain_graph=True
    )
    total = (
        take_rows_sparse(values, KEPT).sum() + take_rows_sparse(values, second_kept).mean() + hidden.square().mean()
    )
    total.backward(retain_graph=True)
    close(x.grad, expected)
    total.backward()
    close(x.grad, 2 * expected)


class Custom(torch.autograd.Function):
    """Reads memory, as a compiled kernel would."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        assert type(grad) is torch.Tensor and grad.data_ptr()
        return grad * 2


def test_python_functions_get_ordinary_gradients():
    x = torch.randn(6, 3, requires_grad=True)
    seen = []
    hidden = x.sin()
    hidden.register_hook(lambda grad: seen.append(type(grad)))
    reset_fallbacks()
    take_rows_sparse(Custom.apply(hidden).sum(1), KEPT).sum().backward()
    assert fallback_report() == {"CustomBackward": 1}
    assert seen == [RowSparseTensor]  # behind the Function the gradient is row-sparse again
    expected = torch.zeros_like(x)
    expected[KEPT] = 4 / 2 * x.detach()[KEPT].cos()
    close(x.grad, expected)


@pytest.mark.parametrize(
    "strided, is_known",
    [
        (lambda x: F.adaptive_avg_pool2d(x[..., None].contiguous(memory_format=torch.channels_last), 1), True),
        (lambda x: F.adaptive_avg_pool1d(x.transpose(1, 2), 1), True),  # [B, T, C], pooled over T
        (lambda x: (x * 1).as_strided((4, 3, 4), (12, 4, 1)), True),
        (lambda x: (x * 1).as_strided((4, 3, 4), (4, 16, 1)), False),  # rows and tokens change places
        (lambda x: (x * 1).as_strided((4, 3, 4), (12, 1, 1)), False),  # entries are there several times
        (lambda x: (x * 1).as_strided((4, 2, 4), (12, 4, 1)), False),
    ],
)
def test_strides_that_are_set(strided, is_known, monkeypatch):
    """No number is read where what is set is what there is, as in pooling: a GPU would make the host wait."""
    if is_known:
        monkeypatch.delattr(RowSparseTensor, "sparsify")
    x, kept = torch.randn(4, 3, 4, requires_grad=True), torch.tensor([1, 3])
    losses = strided(x).flatten(1).sin().sum(1)
    (want,) = torch.autograd.grad(losses[kept].sum(), x, retain_graph=True)
    with strict():
        (got,) = torch.autograd.grad(take_rows_sparse(losses, kept).sum(), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("size, stride", [((2,), (0,)), ((2, 1), (0, 1))])
def test_strides_that_repeat_the_second_of_two_entries(size, stride):
    x = torch.randn(size, requires_grad=True)
    losses = (x * 1).as_strided(size, stride, 1).sin().reshape(2)
    take_rows_sparse(losses, torch.tensor([0])).sum().backward()
    close(x.grad.flatten(), torch.stack([torch.zeros(()), x.detach().flatten()[1].cos()]))


def test_strict_names_the_op_or_node():
    x = torch.randn(6, 3, requires_grad=True)
    with strict(), pytest.raises(RuntimeError, match=r"aten.flip.*\(6, 3\)"):
        take_rows_sparse(x.cumsum(0).sum(1), KEPT).sum().backward()
    with strict(), pytest.raises(RuntimeError, match="CustomBackward"):
        take_rows_sparse(Custom.apply(x).sum(1), KEPT).sum().backward()
    reset_fallbacks()
    take_rows_sparse(x.cumsum(0).sum(1), KEPT).sum().backward()
    assert fallback_report()


def test_compiled_model(losses):
    net, _, _, _ = losses
    x, labels = torch.randn(6, 3), torch.tensor([0, 1] * 3)
    compiled = torch.compile(net, backend="aot_eager")
    gradients = []
    for take in (lambda v: v[KEPT], lambda v: take_rows_sparse(v, KEPT)):
        net.zero_grad()
        take(F.cross_entropy(compiled(x), labels, reduction="none")).mean().backward()
        gradients.append(net[0].weight.grad.clone())
    close(*gradients)


def test_nearly_all_rows_take_the_dense_path(losses):
    values = losses[-1]
    assert "IndexSelect" in type(take_rows_sparse(values, torch.arange(6)).grad_fn).__name__


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="Expected"):
        take_rows_sparse(torch.tensor(0.0), KEPT)
    with pytest.raises(ValueError, match="Expected"):
        take_rows_sparse(torch.zeros(2), KEPT[:0])


@pytest.mark.parametrize("kept", [[3, 1], [0, 2, 1, 3], [4, 0, 2]])
def test_kept_indices_in_any_order(kept):
    torch.manual_seed(0)
    kept, x, factors = torch.tensor(kept), torch.rand(6, 3, requires_grad=True), torch.rand(len(kept))
    losses = (x @ torch.rand(3, 3)).sin().sum(1)
    close(take_rows_sparse(losses, kept), losses[kept])
    for taken in (take_rows_sparse(losses, kept, 1.0), losses[kept]):
        (taken @ factors).backward(retain_graph=True)
        factors = -factors
    close(x.grad, torch.zeros_like(x))


def test_kept_indices_are_different(losses):
    with pytest.raises(ValueError, match=r"different, and are \[3, 1, 3\]"):
        take_rows_sparse(losses[-1], torch.tensor([3, 1, 3]))
