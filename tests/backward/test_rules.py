"""Each rule against dense autograd, on random shapes and random kept rows, including one row and all of them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_trim.backward.eager.rows import Rows
from hf_trim.backward.eager.tensor import RowSparseTensor
from hf_trim.backward.settings import fallback_report
from tests.support.rule_cases import CASES, DENSE_CASES, close, compare, rows, slice_small_tensors  # noqa: F401


few = settings(max_examples=8, deadline=None, derandomize=True)


@pytest.mark.parametrize("name", CASES)
@few
@given(data=st.data())
def test_case(name, data):
    compare(CASES[name], data)
    assert not fallback_report()


@pytest.mark.parametrize("name", DENSE_CASES)
@few
@given(data=st.data())
def test_dense_case(name, data):
    compare(DENSE_CASES[name], data)


# ---- single ops on every layout: rows along any dimension, merged with others --------------------------------------


@st.composite
def gradient(draw):
    kept = draw(rows())
    dim, outer, inner = draw(st.integers(0, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    shape = [draw(st.integers(1, 3)) for _ in range(3)]
    shape[dim] = outer * kept.count * inner
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    if draw(st.booleans()):  # a memory layout other than the default
        values = values.transpose(0, 2).contiguous().transpose(0, 2)
    return RowSparseTensor(values, kept, dim, outer, inner)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(gradient())
def test_take_and_densify_are_inverse(grad):
    dense = grad.densify()
    assert dense.shape == grad.shape and dense.stride() == grad.stride()
    close(grad.kept_rows(dense), grad.payload)
    assert dense.count_nonzero() == grad.payload.count_nonzero()
    close(grad.sparsify(dense), dense)


def _and_views(x):
    return x, (x[:1], x[:2])


OPS = {
    "mul": lambda g, x: g * x,
    "mul_broadcast": lambda g, x: g * x[:1] + g * x[0, 0],
    "rdiv": lambda g, x: g / (x.abs() + 1),
    "add": lambda g, x: g + g.sin() - g * 2,
    "add_dense": lambda g, x: g + x,
    "dense_sub": lambda g, x: x - g,
    "dense_add_in_place": lambda g, x: x.clone().add_(g),
    "add_number": lambda g, x: g + 1,
    "exp": lambda g, x: g.exp(),
    "view_flat": lambda g, x: g.contiguous().view(-1),
    "view_split": lambda g, x: g.reshape(*g.shape[:2], 1, g.shape[2]),
    "view_merge": lambda g, x: g.reshape(g.shape[0], -1),
    "view_merge_front": lambda g, x: g.reshape(-1, g.shape[2]),
    "transpose": lambda g, x: g.transpose(0, 2).sin(),
    "permute": lambda g, x: g.permute(1, 2, 0),
    "expand": lambda g, x: g.unsqueeze(1).expand(-1, 4, -1, -1) * 2,
    "squeeze": lambda g, x: g.unsqueeze(-1).squeeze(),
    "sum_0": lambda g, x: g.sum(0),
    "sum_1": lambda g, x: g.sum((1,), keepdim=True),
    "sum_all": lambda g, x: g.sum(),
    "mean": lambda g, x: g.mean((0, 2)),
    "norm": lambda g, x: torch.linalg.vector_norm(g),
    "bmm_left": lambda g, x: g @ x.transpose(1, 2),
    "bmm_right": lambda g, x: x.transpose(1, 2) @ g,
    "mm_left": lambda g, x: g[0] @ x[0].t(),
    "cat": lambda g, x: torch.cat([g, g * 2], 2),
    "cat_dense": lambda g, x: torch.cat([g, x], 1),
    "stack": lambda g, x: torch.stack([g, g.sin()], 1),
    "select": lambda g, x: g[:, 0],
    "slice": lambda g, x: g[:, :, 1:],
    "split": lambda g, x: g.split(2, 1)[0],
    "flip_roll": lambda g, x: g.flip(1).roll(1, 2),
    "pad": lambda g, x: F.pad(g, (1, -1)) if g.shape[2] > 1 else g,
    "any": lambda g, x: g.isnan().any(),
    "copy_to_dense": lambda g, x: x.clone().copy_(g),
    "in_place": lambda g, x: g.clone().mul_(2).mul_(x).neg_(),
    "in_place_dense": lambda g, x: g.clone().add_(x).add_(1),
    "in_place_view": lambda g, x: (lambda c: (c[:, 0].mul_(3), c)[1])(g.clone()),
    "in_place_row_view": lambda g, x: (lambda c: (c[0].add_(3), c)[1])(g.clone()),
    "in_place_row_view_of_a_view": lambda g, x: (lambda c: (c.unsqueeze(1)[0].add_(3), c)[1])(g.clone()),
    "in_place_two_row_views": lambda g, x: (lambda c: ([v.add_(3) for v in (c[0], c[1:], c[:1])], c)[1])(g.clone()),
    "in_place_row_views_held": lambda g, x: (lambda c, v: (v[0].add_(3), v[1].mul_(2), c)[2])(*_and_views(g.clone())),
    "row_views_of_a_view": lambda g, x: (lambda v: torch.cat([v[1:], v[:1]]))(g.clone().unsqueeze(1)),
    "zero": lambda g, x: g.clone().zero_(),
    "new_zeros": lambda g, x: torch.zeros_like(g) + g.new_zeros(g.shape),
}


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(grad=gradient())
def test_op(name, grad):
    dense = grad.densify()
    x = torch.randn(grad.shape, generator=torch.Generator().manual_seed(0))
    try:
        expected = OPS[name](dense, x)
    except RuntimeError:
        return  # the layout does not allow it: a view across strides
    try:
        close(OPS[name](grad, x), expected)
    except RuntimeError as error:
        assert "Work on a copy" in str(error)  # refused, not wrong
    close(grad, dense)


WRITES = {
    "add_": lambda x: x.add_(1),
    "zero_": lambda x: x.zero_(),
    "copy_": lambda x: x.copy_(x.flip(0)),
    "part": lambda x: x[:, 0].mul_(2),
    "entry": lambda x: x[1, 0, 2].fill_(5),
    "dense": lambda x: x.data_ptr() and x.add_(1),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_is_written_to_a_view_along_the_rows_reaches_what_it_is_a_view_of(write):
    grad = RowSparseTensor(torch.ones(2, 3), Rows(torch.tensor([1, 4]), 6))
    expected = grad.densify()
    for x in (grad, expected):
        write(x.unsqueeze(1)[1:])
    close(grad, expected)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_is_refused_where_it_would_not_reach_all(write):
    grad = RowSparseTensor(torch.ones(2, 3), Rows(torch.tensor([1, 4]), 6))
    relatives = [grad.t(), grad.unsqueeze(1)]
    view = relatives[1][1:]
    close(view, grad.densify()[1:, None])
    close(view.flip(0), grad.densify()[1:, None].flip(0))
    assert view[0, 0, 0].item() == 1
    with pytest.raises(RuntimeError, match="Work on a copy"):
        write(view)
    close(grad, relatives[0].t())
    del relatives, view
    write(grad.unsqueeze(1)[1:])  # nothing else shares its memory any more


def test_memory_is_shared_with_whole_views_only():
    payload = torch.arange(24.0).view(2, 3, 4)
    for part in (
        payload[:, :, 1:],
        payload.mT,
        payload[:1],
        payload[..., :1].expand(2, 3, 4),
        payload.unfold(1, 2, 1),
    ):
        grad = RowSparseTensor(part, Rows(torch.tensor([1, 4][: len(part)]), 6))
        like = torch.empty_strided(grad.shape, grad.stride())
        for size in ([-1], [grad.shape[0], -1], [-1, *grad.shape[2:]]):
            try:
                like.view(size)
            except RuntimeError:
                with pytest.raises(RuntimeError):
                    grad.view(size)
            else:
                assert grad.view(size).payload.data_ptr() == part.data_ptr()
            close(grad.reshape(size), grad.densify().reshape(size))


def test_views_of_one_kept_row():
    grad = RowSparseTensor(torch.tensor([[1.0, 2, 3, 4]]), Rows(torch.tensor([2]), 6))
    expected = grad.densify().t().reshape(8, 3)
    view = grad.t().view(8, 3)  # its strides allow it, those of a view of the ordinary tensor do not
    close(view, expected)
    with pytest.raises(RuntimeError, match="Work on a copy"):
        view.add_(1)
    close(grad.t(), expected.view(4, 6))
