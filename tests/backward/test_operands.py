"""Operands that are not plain numbers in memory: lazy conjugates and negatives, sparse and nested tensors."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from hf_trim.backward import fallback_report, take_rows_sparse


KEPT = torch.tensor([1, 3])
generator = torch.Generator().manual_seed(0)
draw = partial(torch.randn, dtype=torch.double, generator=generator)
X, WEIGHT, OTHER = draw(5, 4), draw(4, 4), draw(5, 4)
COMPLEX = torch.complex(WEIGHT, draw(4, 4))
COUNTS = OTHER.clamp(min=0)  # as in a bag of words


def gradients(losses_of, take):
    x, weight = (p.clone().requires_grad_() for p in (X, WEIGHT))
    taken = take(losses_of(x, weight))
    if taken.is_complex():  # the gradient that arrives is a lazy conjugate
        taken = torch.view_as_real(taken.conj().resolve_conj())
    cotangent = torch.arange(1.0, 1.0 + taken.numel(), dtype=torch.double).view_as(taken)
    taken.backward(cotangent)
    return [p.grad for p in (x, weight) if p.grad is not None]


def assert_as_dense(losses_of):
    sparse = gradients(losses_of, partial(take_rows_sparse, kept=KEPT))
    torch.testing.assert_close(sparse, gradients(losses_of, lambda losses: losses[KEPT]), rtol=1e-10, atol=1e-10)


def as_complex(x):
    return torch.complex(x, x.flip(1).sin())


BITS = {
    "product": lambda x, w: (as_complex(x) @ (w * COMPLEX)).real,
    "view of a product": lambda x, w: (as_complex(x).unsqueeze(1) @ (w * COMPLEX).expand(5, 4, 4)).abs()[:, 0],
    "product of rows": lambda x, w: (as_complex(x)[:, None] @ as_complex(x).conj()[:, :, None]).imag[:, 0] * w[0],
    "saved negative": lambda x, w: x * as_complex(x @ w).conj().imag,
    "saved negative of a formula": lambda x, w: torch.xlogy(x, (as_complex(w[:1] - x).conj().imag - 2).neg()),
    "saved conjugate of a formula": lambda x, w: as_complex(x @ w).conj().sin().real,
    "gradient": lambda x, w: torch.view_as_real(torch.polar((x @ w).exp(), x)).sum(-1),
    "incoming gradient": lambda x, w: as_complex(x @ w),
    "fft": lambda x, w: torch.fft.hfft((x @ w).sin()),
}


@pytest.mark.parametrize("name", BITS)
def test_bits(name, monkeypatch):
    """Complex programs save conjugates: their rows are taken as the numbers that they stand for."""
    monkeypatch.setattr("hf_trim.backward.eager.saved.MIN_ELEMENTS", 0)
    assert_as_dense(BITS[name])


SPARSE = {
    "bag of words": lambda x, w: COUNTS.to_sparse() @ w,
    "bag of words, CSR": lambda x, w: F.linear(COUNTS.to_sparse_csr(), w),
    "adjacency": lambda x, w: (COUNTS @ COUNTS.T).to_sparse() @ (x @ w),
    "adjacency, CSR": lambda x, w: torch.sparse.addmm(x, (COUNTS @ COUNTS.T).to_sparse_csr(), x @ w),
    "elementwise": lambda x, w: (COUNTS.to_sparse() * (x @ w)).to_dense(),
    "nested": lambda x, w: torch.nested.as_nested_tensor([row[None] @ w for row in x]).to_padded_tensor(0.0).sum(1),
    "jagged": lambda x, w: (
        torch.nested.as_nested_tensor([x[:i] @ w for i in range(1, 6)], layout=torch.jagged)
        .to_padded_tensor(0.0)
        .sum(1)
    ),
}


@pytest.mark.parametrize("name", SPARSE)
def test_layouts(name):
    """Sparse and nested operands have no rows to take: the op runs dense."""
    assert_as_dense(SPARSE[name])
    assert fallback_report()
