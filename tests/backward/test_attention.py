"""Attention in the kernels of CUDA: dropout inside, biases that are learned, and masks that are padded in memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hf_trim.backward.eager.rows import Rows
from hf_trim.backward.eager.sparse import take_rows_sparse
from hf_trim.backward.settings import strict
from tests.support.attention_kernels import KERNELS, attend, register
from tests.support.rule_cases import Net, close, gradients


@pytest.fixture(scope="module", autouse=True)
def kernels_on_the_cpu():
    with torch.library._scoped_library("aten", "IMPL") as library:
        register(library)
        yield


def attention(kernel, dropout_p, bias):
    def case(net, x):
        def run(x):
            net.count = 0
            q, k, v = ((x @ net.w(x.shape[2], 6)).unflatten(2, (2, 3)).transpose(1, 2) for _ in range(3))
            shape = len(x), 2, x.shape[1], x.shape[1]
            return attend(kernel, q, k, v, bias and bias(net, shape).expand(shape), dropout_p).transpose(1, 2)

        return run(x)

    return case


BIASES = {
    "none": None,
    "learned": lambda net, shape: net.w(1, *shape[1:]),
    "of samples": lambda net, shape: torch.linspace(-1, 1, shape[0])[:, None, None, None] * net.w(1, *shape[1:]),
}


@pytest.mark.parametrize("kept", [[4], [4, 1], [0, 2, 3]])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize(
    "kernel, bias", [*((kernel, "none") for kernel in KERNELS), ("efficient", "learned"), ("efficient", "of samples")]
)
def test_exact(kernel, bias, dropout_p, checkpointed, kept, recomputed):
    function, net, x, kept = (
        attention(kernel, dropout_p, BIASES[bias]),
        Net(),
        torch.randn(6, 4, 5),
        torch.tensor(kept),
    )

    def case(net, x):
        return checkpoint(function, net, x, use_reentrant=False) if checkpointed else function(net, x)

    dense = gradients(case, x, lambda losses: losses[kept], net)
    with strict():
        sparse = gradients(case, x, lambda losses: take_rows_sparse(losses, kept), net)
    for a, b in zip(dense, sparse, strict=True):
        close(a, b)
    assert recomputed == {"kept": int(checkpointed), "all": 0}


def test_masks_keep_the_strides_that_kernels_check():
    mask = F.pad(torch.randn(6, 1, 13, 13), (0, 3))[..., :13].expand(-1, 4, -1, -1)
    for kept in ([1, 4], [0, 1]):
        part = Rows(torch.tensor(kept), 6).take(mask)
        assert part.stride() == (208, 0, 16, 1)
        close(part, mask[kept])
    end = torch.randn(6 * 208 - 3).as_strided((6, 13, 13), (208, 16, 1))  # the last padding is not in memory
    close(Rows(torch.tensor([1, 5]), 6).take(end), end[[1, 5]])
