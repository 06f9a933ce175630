"""Settings and counters belong to a thread, and to the threads that autograd runs its backward pass in."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_trim.backward._torch_internals import context_of_backward
from hf_trim.backward.eager.sparse import take_rows_sparse
from hf_trim.backward.settings import checked, current_settings, fallback_report, reset_fallbacks, strict


KEPT = torch.tensor([1, 3])


def backward_without_a_rule():
    take_rows_sparse(torch.rand(5, 3, requires_grad=True).flip(0).sum(1), KEPT).sum().backward()
    return list(fallback_report())


def test_threads_do_not_see_each_other():
    reset_fallbacks()
    with ThreadPoolExecutor(1) as other, strict():
        assert other.submit(backward_without_a_rule).result() == ["aten.flip.default"]
        with pytest.raises(RuntimeError, match=r"aten\.flip"):
            backward_without_a_rule()
    assert not fallback_report()
    assert backward_without_a_rule() == ["aten.flip.default"]


class Nested(torch.autograd.Function):
    """A backward pass within a backward pass, and so on; autograd runs those from the 60th on in another thread."""

    @staticmethod
    def forward(ctx, x, depth, innermost):
        ctx.depth, ctx.innermost = depth, innermost
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.depth:
            with torch.enable_grad():
                Nested.apply(torch.ones(1, requires_grad=True), ctx.depth - 1, ctx.innermost).backward()
        else:
            ctx.innermost()
        return grad, None, None


def test_autograds_threads_have_those_of_the_thread_that_called_backward():
    seen = []

    def innermost():
        if context_of_backward() is None:
            pytest.skip("this version of torch does not hand its context on")
        seen.append((threading.get_ident(), current_settings()))

    for enabled in (False, True):
        with checked(enabled):
            Nested.apply(torch.ones(1, requires_grad=True), 61, innermost).backward()
            thread, settings = seen.pop()
            assert thread != threading.get_ident() and settings is current_settings()
