"""
Part 2: `hf_trim.bench` at the sizes of base models, and the head of a language model in chunks beside whole logits and
Liger's fused loss.

First all that runs eagerly, then the compiled models: these take a minute each until they are compiled.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hf_trim.bench.__main__ import bench_model
from hf_trim.bench.arguments import BenchArguments
from hf_trim.bench.checks import compare_gradients, compute_gradients, measure_peak_memory
from hf_trim.bench.models import build_model, make_batch
from hf_trim.bench.steps import UNTRIMMED, StepKind, TokenSteps, time_steps
from hf_trim.bench.summary import measure_spread
from tests.support.gpu.process import Unavailable


# The difference that bfloat16 makes between two right gradients of a deep model.
LIMIT = 5e-2
# Model → tokens of a text, and samples of a batch. 25,000 tokens a batch are where eager row-sparse gradients were
# estimated to be as fast as dense ones for a base model.
SIZES: dict[str, tuple[int, tuple[int, ...]]] = {
    "bert-base": (128, (32, 128, 512)),
    "vit-base": (197, (32, 128, 256)),
    "llama-1b": (512, (4, 16)),
}
COMPILED = {"bert-base": 128, "vit-base": 128, "llama-1b": 16}
HEAD_TOKENS, HEAD_WIDTH = 8192, 2048  # Llama 3.2 1B's, with its vocabulary
TOY: dict[str, Any] = {"layers": 1, "hidden_size": 64, "vocab_size": 50}


class LigerSteps(TokenSteps):
    """The plain mean with Liger's fused loss, which has chunks of logits, too, and keeps all tokens."""

    def forward(self, kind: StepKind) -> torch.Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            hidden, weight = self._head_inputs()
            return LigerFusedLinearCrossEntropyLoss()(weight, hidden.flatten(0, -2), self.target.flatten())


def bench_case(arguments: dict[str, Any]) -> dict[str, Any]:
    """
    Args:
        arguments (`dict`): Of [`~hf_trim.bench.arguments.BenchArguments`], with one model.

    Returns:
        `dict[str, Any]`: What the benchmark writes of the model, and the `problem` if a gradient is wrong.
    """
    with TemporaryDirectory() as folder:
        args = BenchArguments(**arguments, output=str(Path(folder) / "bench.json"))
    result = bench_model(args.models[0], args)
    for step in result["steps"]:
        error, name = step["gradient_error"], f"{step['mode']} at p = {step['keep']:g}"
        if error is not None and not error <= LIMIT:
            result["problem"] = f"{name}: gradients differ by {error:.1e}"
        elif step["fallbacks"]:
            result["problem"] = f"{name}: ran dense: {step['fallbacks']}"
    return result


def liger_case(arguments: dict[str, Any]) -> dict[str, Any]:
    """Liger's fused loss beside whole logits, both with the plain mean; time, memory and gradients."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise Unavailable("the package liger_kernel is not installed")
    args = BenchArguments(**arguments)
    model = build_model("lm-head", args)
    batch = make_batch(model.config, args)
    whole, liger = (kind(model, batch, args.dtype) for kind in (TokenSteps, LigerSteps))
    grads, reference = (compute_gradients(steps, UNTRIMMED) for steps in (liger, whole))
    result: dict[str, Any] = {"gradient_error": compare_gradients(grads, reference), "limit": LIMIT}
    del grads, reference
    for name, steps in (("whole", whole), ("liger", liger)):
        seconds = [sum(pair) for pair in time_steps(steps, [UNTRIMMED], args.repeats)[UNTRIMMED]]
        result[name] = {"step": measure_spread(seconds), "peak_memory_bytes": measure_peak_memory(steps, UNTRIMMED)}
    if not result["gradient_error"] <= LIMIT:
        result["problem"] = f"gradients differ by {result['gradient_error']:.1e}"
    return result


def make_cases(device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """
    Args:
        device (`str`): `"cuda"`, or `"cpu"` for a few cases at toy size.

    Returns:
        `dict[str, Callable]`: Name → what runs the case.
    """
    common: dict[str, Any] = {"device": device, "dtype": "bfloat16", "repeats": 5, "keep": [0.2, 0.5]}
    head = {**common, "models": ["lm-head"], "modes": ["dense", "sparse"]}
    if device == "cpu":
        toy = {**common, **TOY, "repeats": 1, "keep": [0.5], "batch_size": 6, "seq_length": 8}
        return {
            "bert, 6 samples": partial(bench_case, {**toy, "models": ["bert"]}),
            "head: whole logits and chunks": partial(bench_case, {**head, **toy}),
            "head: Liger": partial(liger_case, {**head, **toy}),
        }
    head |= {"batch_size": HEAD_TOKENS // 512, "seq_length": 512, "hidden_size": HEAD_WIDTH}
    eager = {
        f"{name}, {size} samples": partial(
            bench_case, {**common, "models": [name], "batch_size": size, "seq_length": length}
        )
        for name, (length, sizes) in SIZES.items()
        for size in sizes
    }
    compiled = {
        f"{name}, {size} samples, compiled": partial(
            bench_case,
            {
                **common, "models": [name], "batch_size": size, "seq_length": SIZES[name][0], "torch_compile": True,
                "modes": ["dense", "sparse"], "dropout": 0.0,
            },
        )
        for name, size in COMPILED.items()
    }  # fmt: skip
    return {
        **eager,
        "head: whole logits and chunks": partial(bench_case, head),
        "head: Liger": partial(liger_case, head),
        **compiled,
    }
