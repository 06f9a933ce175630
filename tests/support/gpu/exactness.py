"""
Part 1: gradients of the row-sparse backward pass beside those of dense autograd, on the same kept rows and with the
same dropout masks; and where a training makes the host wait.

Each of CUDA's attention kernels alone, tiny models of many families in float32 and under autocast, checkpointed and
compiled. On the CPU: a few of each, with the kernels that it has.
"""

import warnings
from collections.abc import Callable
from functools import cache, partial
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_trim.backward._compile_internals import reset_compiler
from hf_trim.backward.eager.sparse import take_rows_sparse
from hf_trim.backward.settings import fallback_report, refused_graphs, reset_fallbacks
from hf_trim.bench.checks import recorded_waits
from tests.support import compiled, waits
from tests.support.gpu.process import Unavailable
from tests.support.models import (
    BATCH,
    DECODERS,
    FAMILIES,
    KEPT,
    TIMM_MODELS,
    TRANSFORMERS,
    build,
    classification_losses,
    difference,
    gradients,
    sequence_losses,
)
from tests.support.observe import count_recomputations, record_graph_runs


# Both round at the same places, but sum the products of fewer rows in another order.
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}  # of autocast
KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
HALF_ONLY, WITHOUT_MASKS = ("flash", "cudnn"), ("flash",)
NO_KERNEL = ("No available kernel", "No viable backend")
LENGTHS = {"": 96, ", odd length": 93}
HEADS, HEAD_SIZE = 2, 64
# Models whose backward pass reads the device: which tokens an expert gets follows from their values, and so does,
# outside of a trainer, which token of a text is looked up.
READS = {"mixtral", "mixtral, experts in a loop", *DECODERS}


class Attention(nn.Module):
    """Attention alone, over images `[B, 3, 16, 16]` cut into tokens, with the layers before and behind it."""

    config = None

    def __init__(self, length: int, dropout: float = 0.0, mask: str | None = None, is_causal: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.length, self.dropout, self.is_causal = length, dropout, is_causal
        self.first, self.last = nn.Linear(8, 3 * HEADS * HEAD_SIZE), nn.Linear(HEADS * HEAD_SIZE, 3)
        if mask == "mask":  # another length for each sample
            lengths = length - torch.arange(BATCH) * 7
            allowed = torch.arange(length) < lengths[:, None]
            self.register_buffer("mask", allowed[:, None, None].expand(BATCH, 1, length, length).contiguous())
        else:  # a bias that is learnt, as of relative positions
            self.mask = nn.Parameter(torch.randn(1, HEADS, length, length)) if mask == "bias" else None

    def forward(self, x):
        tokens = self.first(x.flatten(1)[:, : self.length * 8].view(BATCH, self.length, 8))
        q, k, v = tokens.unflatten(-1, (3, HEADS, HEAD_SIZE)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, self.mask, self.dropout, self.is_causal)
        return self.last(out.transpose(1, 2).flatten(2)).mean(1)


def compare(
    model: nn.Module,
    dtype: str,
    losses_of: Callable = classification_losses,
    may_read: bool = False,
) -> dict[str, Any]:
    """
    Compare the two backward passes of a model.

    Args:
        model (`torch.nn.Module`): The model, on its device.
        dtype (`str`): `"float32"`, or `"bfloat16"` by autocast.
        losses_of (`Callable`, *optional*): The losses of its samples, as those in `tests/support/models.py`.
        may_read (`bool`, *optional*, defaults to `False`): Whether the backward pass may make the host wait.

    Returns:
        `dict[str, Any]`: `gradient_error` and its `limit`, `fallbacks`, `host_waits` beyond those of the dense step
            (`None` on the CPU), and the `problem` if there is one.
    """
    device = next(model.parameters()).device
    kept = torch.tensor(KEPT, device=device)
    ways = {"dense": lambda losses: losses[kept], "sparse": lambda losses: take_rows_sparse(losses, kept)}
    run = {way: partial(gradients, model, take, losses_of, DTYPES[dtype]) for way, take in ways.items()}
    try:
        dense = run["dense"]()
    except (RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise Unavailable(f"dense autograd does not run it either: {error}") from error
    reset_fallbacks()
    result = {
        "gradient_error": difference(run["sparse"](), dense),
        "limit": LIMITS[dtype],
        "fallbacks": fallback_report(),
        "host_waits": _more_waits(run) if device.type == "cuda" else None,
    }
    if not result["gradient_error"] <= result["limit"]:  # NaN is a problem, too
        result["problem"] = f"gradients differ by {result['gradient_error']:.1e}"
    elif result["fallbacks"]:
        result["problem"] = f"ran dense: {result['fallbacks']}"
    elif result["host_waits"] and not may_read:
        result["problem"] = f"the host waits {result['host_waits']} times more than in a dense step"
    return result


def _more_waits(run: dict[str, Callable]) -> int:
    counts = {}
    for way, step in run.items():
        with recorded_waits() as found:
            step()
        counts[way] = len(found)
    return counts["sparse"] - counts["dense"]


def kernel_case(kernel: str, dtype: str, device: str, **options) -> dict[str, Any]:
    """An attention kernel. If it does not take this, its reasons are given."""
    model = Attention(**options).to(device)

    def losses_of(*args):
        with sdpa_kernel(KERNELS[kernel]):
            return classification_losses(*args)

    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter("always")
        try:
            gradients(model, lambda losses: losses[:1], losses_of, DTYPES[dtype])
        except RuntimeError as error:
            if not any(text in str(error) for text in NO_KERNEL):
                raise
            told = " ".join(dict.fromkeys(str(reason.message).split(" (Triggered")[0] for reason in reasons))
            raise Unavailable(told or str(error)) from None
    return compare(model, dtype, losses_of)


def model_case(name: str, dtype: str, device: str, is_checkpointed: bool = False) -> dict[str, Any]:
    """A tiny model of the list."""
    model = _build(name).to(device)
    losses_of = sequence_losses if name in FAMILIES else classification_losses
    if not is_checkpointed:
        return compare(model, dtype, losses_of, name in READS)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.MonkeyPatch.context() as patch:
        recomputed = count_recomputations(patch)
        result = compare(model, dtype, losses_of, name in READS)
    if recomputed["all"] or not recomputed["kept"]:
        result.setdefault("problem", f"recomputed not the kept rows alone: {recomputed}")
    return result


def _build(name: str) -> nn.Module:
    if name in TIMM_MODELS:
        return build(TIMM_MODELS[name])

    def config():
        config = {**TRANSFORMERS, **FAMILIES}[name]()
        if name not in FAMILIES and hasattr(config, "hidden_size"):
            config.hidden_size = 32  # heads of 8: most of CUDA's kernels take no smaller ones
        return config

    if name in FAMILIES:  # not all of which have another attention
        return build(config, "eager", tf.AutoModelForCausalLM)
    return build(config)


def compiled_case(name: str, device: str) -> dict[str, Any]:
    """A compiled model, with dropout in its attention if its config has that by default."""
    model = compiled.small(name) if name in TIMM_MODELS else compiled.small(name, hidden_size=32)
    backend = "hf_trim" if device == "cuda" else compiled.DECOMPOSED
    reset_compiler()
    reset_fallbacks()
    with pytest.MonkeyPatch.context() as patch:
        runs = record_graph_runs(patch)
        try:
            error = compiled.check(model.to(device), runs, tolerance=LIMITS["float32"], backend=backend)
        except AssertionError as error:
            seen = {"refused": refused_graphs(), "fallbacks": fallback_report(), "runs": runs, "error": str(error)}
            return {"problem": f"not exact, or not on the kept rows alone: {seen}"}
    return {"gradient_error": error, "limit": LIMITS["float32"], "fallbacks": {}, "host_waits": None}


def waits_case(kind: str, accumulation: int, device: str) -> dict[str, Any]:
    """Where a training makes the host wait, beside plain `Trainer`'s."""
    plain = _plain_waits(waits.plain_kind(kind), accumulation, device)
    with TemporaryDirectory() as folder:
        ours = waits.waits_of_kind(kind, folder, accumulation, device=device)
    more, expected = ours.total() - plain.total(), ours.mini_batches * waits.EXPECTED.get(kind, 0)
    places = {f"{what} at {place}": count for (what, place), count in (ours - plain).items()}
    result = {"host_waits": more, "expected_waits": expected, "plain_waits": plain.total(), "places": places}
    if not plain.total():
        result["problem"] = "no wait was counted, not even of plain Trainer"
    elif more > expected:
        result["problem"] = f"the host waits {more} times more than plain Trainer's, expected {expected}: {places}"
    return result


@cache
def _plain_waits(kind: str, accumulation: int, device: str) -> waits.Waits:
    with TemporaryDirectory() as folder:
        return waits.waits_of_kind(kind, folder, accumulation, is_trimmed=False, device=device)


def _kernel_cases(device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    variants: dict[str, dict[str, Any]] = {
        "": {},
        ", dropout": {"dropout": 0.2},
        ", causal": {"is_causal": True},
        ", mask": {"mask": "mask"},
        ", mask, dropout": {"mask": "mask", "dropout": 0.2},
        ", bias": {"mask": "bias"},
    }
    return {
        f"attention {kernel}, {dtype}{variant}{length}": partial(
            kernel_case, kernel, dtype, device, length=LENGTHS[length], **options
        )
        for kernel in KERNELS
        for dtype in ("bfloat16", "float32")
        for variant, options in variants.items()
        for length in LENGTHS
        if not (dtype == "float32" and kernel in HALF_ONLY or "mask" in options and kernel in WITHOUT_MASKS)
    }


def make_cases(device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """
    Args:
        device (`str`): `"cuda"`, or `"cpu"` for a few cases.

    Returns:
        `dict[str, Callable]`: Name → what runs the case.
    """
    kernels, is_toy = _kernel_cases(device), device == "cpu"
    if is_toy:
        names = ("math, float32, mask, dropout, odd length", "flash, bfloat16, causal", "cudnn, bfloat16")
        kernels = {name: kernels[name] for name in (f"attention {name}" for name in names)}
    names = ("bert", "timm_vit") if is_toy else (*TRANSFORMERS, *TIMM_MODELS, *FAMILIES)
    checkpointed = ("llama",) if is_toy else ("bert", "gpt2", "llama", "vit", "beit")
    kinds = ("samples, sparse",) if is_toy else tuple(waits.KINDS)
    return {
        **kernels,
        **{f"{name}, {dtype}": partial(model_case, name, dtype, device) for dtype in DTYPES for name in names},
        **{f"{name}, checkpointing": partial(model_case, name, "bfloat16", device, True) for name in checkpointed},
        **{f"waits: {kind}": partial(waits_case, kind, 4, device) for kind in kinds},
        **{
            f"{name}, compiled": partial(compiled_case, name, device)
            for name in (("vit",) if is_toy else ("bert", "llama", "vit", "convnext"))
        },
    }
