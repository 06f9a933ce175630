"""
What is checked of a step beside its time: gradients, ops without a rule, memory, waits of the host.

A kind of step → relative error of its gradients, names and counts of fallbacks, bytes, how often the host waits.
"""

import gc
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from math import hypot

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hf_trim.backward._torch_internals import memory_changes
from hf_trim.backward.settings import fallback_report, reset_fallbacks
from hf_trim.backward.tape.tapes import TAPE_STEPS
from hf_trim.bench.steps import StepKind, Steps


SYNCHRONIZES = "called a synchronizing CUDA operation"  # torch's warning


def measure_peak_memory(steps: Steps, kind: StepKind) -> int:
    """
    Measure the memory of a step: the highest sum of the tensors that it makes, temporary ones included.

    Args:
        steps ([`~hf_trim.bench.steps.Steps`]): The model.
        kind ([`~hf_trim.bench.steps.StepKind`]): What to do.

    Returns:
        `int`: Bytes beyond weights and inputs.
    """
    steps.prepare(seed=0)
    gc.collect()
    if steps.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        steps.forward(kind).backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler announces itself
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        steps.forward(kind).backward()
    # Each change in the order of time: a positive size where a tensor is made, a negative one where it is freed.
    return max(0, *accumulate(memory_changes(profiler)))


@contextmanager
def recorded_waits() -> Iterator[list[warnings.WarningMessage]]:
    """Records each operation in this context that makes the host wait for a GPU, as torch notices it."""
    waits: list[warnings.WarningMessage] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
            waits += [warning for warning in found if SYNCHRONIZES in str(warning.message)]


def count_waits(steps: Steps, kind: StepKind) -> int | None:
    """
    Args:
        steps ([`~hf_trim.bench.steps.Steps`]): The model.
        kind ([`~hf_trim.bench.steps.StepKind`]): What to do.

    Returns:
        `int` or `None`: How often the host waits for the GPU in a step; `None` on the CPU.
    """
    if steps.device != "cuda":
        return None
    steps.prepare(seed=0)
    with recorded_waits() as waits:
        steps.forward(kind).backward()
    return len(waits)


def compute_gradients(steps: Steps, kind: StepKind) -> list[Tensor]:
    """
    Args:
        steps ([`~hf_trim.bench.steps.Steps`]): The model.
        kind ([`~hf_trim.bench.steps.StepKind`]): What to do.

    Returns:
        `list[torch.Tensor]`: The gradient of each parameter, of its shape; zeros if it has none.
    """
    steps.prepare(seed=0)
    steps.forward(kind).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in steps.model.parameters()]
    steps.model.zero_grad(set_to_none=True)
    return grads


def compare_gradients(grads: list[Tensor], reference: list[Tensor]) -> float:
    """
    Args:
        grads (`list[torch.Tensor]`): Gradients.
        reference (`list[torch.Tensor]`): The right gradients.

    Returns:
        `float`: Norm of the difference over the norm of the reference, over all parameters together.
    """
    differences = [float(torch.linalg.vector_norm(x - y)) for x, y in zip(grads, reference, strict=True)]
    norms = [float(torch.linalg.vector_norm(y)) for y in reference]
    return hypot(*differences) / hypot(*norms)


def check_steps(steps: Steps, kinds: list[StepKind]) -> dict[StepKind, dict]:
    """
    Compare gradients with those of the dense backward pass of the same forward pass, count fallbacks, and measure
    memory.

    Args:
        steps ([`~hf_trim.bench.steps.Steps`]): The model.
        kinds (`list[StepKind]`): The kinds of steps; at each p dense comes first.

    Returns:
        `dict[StepKind, dict]`: `gradient_error` (or `None`), `fallbacks`, `peak_memory_bytes`, `host_waits` (or
        `None`), and `first_seconds` of the first step. It includes the compilation if no kind before had the model
        compiled.
    """
    checks: dict[StepKind, dict] = {}
    reference: list[Tensor] | None = None
    losses = []
    for seed in (0, 1):
        steps.prepare(seed)
        with torch.no_grad():
            losses.append(steps.losses())
    deterministic = torch.equal(*losses)  # with dropout, replay draws masks of its own
    for kind in kinds:
        reset_fallbacks()
        error, start = None, time.perf_counter()
        grads = compute_gradients(steps, kind)
        first = time.perf_counter() - start
        if kind.backward == "sparse" and not kind.is_compiled:
            for _ in range(TAPE_STEPS):  # what is checked is the tape, if there is one
                grads = compute_gradients(steps, kind)
        if kind.backward == "dense":
            reference, error = grads, 0.0
        elif kind.backward == "sparse" or (kind.backward == "replay" and deterministic):
            assert reference is not None  # dense came first
            error = compare_gradients(grads, reference)
        del grads  # two sets of gradients at most are in memory
        checks[kind] = {"gradient_error": error, "fallbacks": fallback_report(), "first_seconds": first}
    del reference  # so that memory is measured without it
    for kind in kinds:
        checks[kind]["peak_memory_bytes"] = measure_peak_memory(steps, kind)
        checks[kind]["host_waits"] = count_waits(steps, kind)
    return checks
