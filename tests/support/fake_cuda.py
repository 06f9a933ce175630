"""
What a GPU would run, seen without one: forward and row-sparse backward passes of tiny models on *fake* CUDA tensors,
which have shape, strides and device, but no memory.

`python -m tests.support.fake_cuda CASE...` runs cases such as `bert-efficient-dropout-mask` in a process that has the
library of [`build_library`] preloaded, and prints a line of JSON for each: what ran dense, which ops made the host
wait, what a kernel would have refused, and the batch sizes of the backward pass of attention.
"""

import json
import math
import os
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only


aten = torch.ops.aten
SOURCE = Path(__file__).with_suffix(".cpp")
BATCH, KEPT, LENGTH, ODD_LENGTH = 6, 2, 16, 13
KERNELS = ("flash", "efficient", "cudnn")
OPTIONS = ("dropout", "mask", "autocast", "checkpointing", "single", "devices", "compiled")


# ---- the process of the tests ------------------------------------------------------------------------------------


def build_library(folder):
    """
    Compile the library that has to be preloaded.

    Args:
        folder (`Path`): Where to.

    Returns:
        `Path`: The library.

    Raises:
        `OSError` or `subprocess.SubprocessError`: If there is no compiler, or it fails.
    """
    root, library = Path(torch.__file__).parent, folder / "libfake_cuda.so"
    command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(library), f"-I{root}/include"]
    command += [f"-L{root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def run_cases(library, cases):
    """Run cases in a process of their own; returns what it prints for each, by the case's name."""
    command = [sys.executable, "-m", __spec__.name, *cases]
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(lines) != len(cases):
        raise RuntimeError(done.stderr[-2000:])
    return dict(zip(cases, map(json.loads, lines), strict=True))


# ---- what CUDA does otherwise than the CPU ------------------------------------------------------------------------


class Cuda(FakeTensorMode):
    """Fake tensors, with notes of what a GPU would not like."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.waits, self.refused, self.attention = Counter(), set(), []

    def dispatch(self, func, types, args=(), kwargs=None):
        """Called for each op on fake tensors, and for those on tensors of rows."""
        if "attention_backward" in func.name() and not any("Row" in kind.__name__ for kind in types):
            self._check_attention(func, args)
        try:
            return super().dispatch(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            self.waits[func.name()] += 1
            raise

    def _check_attention(self, func, args):
        names = [argument.name for argument in func._schema.arguments]
        tensors = {name: x for name, x in zip(names, args, strict=False) if isinstance(x, torch.Tensor)}
        self.attention.append(len(tensors["query"]))
        for name, x in tensors.items():
            if name == "attn_bias":
                is_fine = x.stride(-1) == 1 and not any(
                    n > 1 and stride % 8 for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
                )
            elif name == "logsumexp":
                is_fine = x.is_contiguous()
            else:
                is_fine = x.ndim != 4 or x.stride(-1) == 1
            if not is_fine:
                self.refused.add(f"{name} {tuple(x.shape)} with strides {x.stride()}")


def attend(kernel, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Attention with one of CUDA's kernels: what comes before the kernel is as in PyTorch's `attention.cpp`."""
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    if attn_mask is None and kernel == "flash":
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, -math.inf)
        if any(stride % 8 for stride in attn_mask.stride()[:-1]):
            size = attn_mask.shape[-1]
            attn_mask = F.pad(attn_mask, (0, 8 - size % 8))[..., :size]
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    options = (q, k, v, attn_mask, True, dropout_p, is_causal)
    if kernel == "cudnn" and not (attn_mask is not None and attn_mask.requires_grad):  # cuDNN has no gradient of it
        return aten._scaled_dot_product_cudnn_attention(*options, scale=scale)[0]
    return aten._scaled_dot_product_efficient_attention(*options, scale=scale)[0]


# ---- a case ------------------------------------------------------------------------------------------------------


def to_second_device(module, args, kwargs):
    """As accelerate's hooks do for a model with a `device_map`."""
    return tree_map_only(torch.Tensor, lambda value: value.to("cuda:1"), (args, kwargs))


def to_cuda(model, dtype, split=False):
    """
    Gives a model fake parameters and buffers. To be called within the mode. If it is `split`, its last layer and what
    follows are on a second device.
    """
    device = "cuda:0"
    last = [module[-1] for module in model.modules() if isinstance(module, nn.ModuleList)][-1] if split else None
    for module in model.modules():
        if module is last:
            device = "cuda:1"
            module.register_forward_pre_hook(to_second_device, with_kwargs=True)
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is not None:
                    is_cast = x.is_floating_point() and tensors is module._parameters
                    fake = torch.empty(x.shape, dtype=dtype if is_cast else x.dtype, device=device)
                    tensors[name] = nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake
    return model


def make_model(name, dropout):
    import transformers as tf

    from tests.support.models import DECODERS, FAMILIES, TIMM_MODELS, TRANSFORMERS, build

    if name in TIMM_MODELS:
        model = build(TIMM_MODELS[name])
        for block in getattr(model, "blocks", ()):
            block.attn.attn_drop.p = 0.1 if dropout else 0.0
        return model
    config = {**TRANSFORMERS, **FAMILIES}[name]()
    config.hidden_size = 32  # heads of 8: the kernels take no smaller ones
    for key in vars(config):
        if not dropout and key in ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop"):
            setattr(config, key, 0.0)
    return build(lambda: config, head=tf.AutoModelForCausalLM if name in {**DECODERS, **FAMILIES} else None)


def losses_of(model, name, dtype, mask):
    """One loss for each sample."""
    from tests.support.models import VOCAB

    labels = torch.zeros(BATCH, dtype=torch.long, device=next(reversed(list(model.parameters()))).device)
    config = getattr(model, "config", None)
    if config is None or hasattr(config, "image_size"):
        size = 16 if config is None else 8
        images = torch.empty(BATCH, 3, 32 if name == "convnext" else size, 32 if name == "convnext" else size)
        out = model(images.to("cuda", dtype))
        return F.cross_entropy((out if config is None else out.logits).float(), labels, reduction="none")
    length = ODD_LENGTH if mask else LENGTH
    inputs = {"input_ids": torch.ones(BATCH, length, dtype=torch.long, device="cuda")}
    if mask:
        inputs["attention_mask"] = torch.ones(BATCH, 1, length, length, dtype=torch.bool, device="cuda")
    logits = model(**inputs).logits.float()
    if logits.shape[-1] != VOCAB:
        return F.cross_entropy(logits, labels, reduction="none")
    targets = inputs["input_ids"].flatten().to(logits.device)
    return F.cross_entropy(logits.flatten(0, 1), targets, reduction="none").view(BATCH, length).mean(1)


def run_case(case):
    """
    Runs one case.

    Args:
        case (`str`): A model, a kernel of attention and options, e.g. `"bert-efficient-dropout-mask"`.

    Returns:
        `dict`: Its `fallbacks`, `waits` (op → how often), what was `refused`, batch sizes of `attention`, and what
            checkpoints `recomputed`.
    """
    from hf_trim.backward import fallback_report, take_rows_sparse
    from hf_trim.backward.compiled.backend import keep_backward_graphs
    from hf_trim.backward.settings import checked, reset_fallbacks
    from tests.support.observe import count_recomputations

    name, kernel, *options = case.split("-")
    assert kernel in KERNELS and set(options) <= set(OPTIONS), case
    model, dtype = make_model(name, "dropout" in options), torch.bfloat16
    if "checkpointing" in options:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    reset_fallbacks()
    recomputed = count_recomputations(pytest.MonkeyPatch())
    autocast = "autocast" in options

    def attention(*args, **kwargs):  # no `partial`, which the compiler does not take
        return attend(kernel, *args, **kwargs)

    with Cuda() as cuda, patch.object(F, "scaled_dot_product_attention", attention), keep_backward_graphs():
        to_cuda(model, torch.float32 if autocast else dtype, "devices" in options)
        if "compiled" in options:
            model = torch.compile(model, backend="aot_eager", dynamic=True)
        with torch.autocast("cuda", dtype, enabled=autocast):
            losses = losses_of(model, name, torch.float32 if autocast else dtype, "mask" in options)
        kept = torch.arange(1 if "single" in options else KEPT, device=losses.device)
        cuda.waits.clear()
        cuda.attention.clear()  # of what was traced
        with checked(False):  # there are no numbers to compare
            take_rows_sparse(losses, kept).mean().backward()
    grads = [x.grad for x in model.parameters() if x.grad is not None]
    assert grads and all("Row" not in type(grad).__name__ for grad in grads)
    return {
        "fallbacks": fallback_report(),
        "waits": dict(cuda.waits),
        "refused": sorted(cuda.refused),
        "attention": cuda.attention,
        "recomputed": recomputed,
    }


def probe_without_fake_tensors():
    """Whether an elementwise op keeps zeros is tried once with a tensor on the CPU, and remembered: no wait."""
    from hf_trim.backward.eager.rules import pointwise

    keeps_zeros = pointwise.keeps_zeros

    def probe(*args):
        with _disable_current_modes():
            return keeps_zeros(*args)

    pointwise.keeps_zeros = probe


def main():
    torch.cuda.current_device = lambda: 0  # there is nothing to initialize
    probe_without_fake_tensors()
    for case in sys.argv[1:]:
        try:
            print(json.dumps(run_case(case)), flush=True)
        except Exception:
            print(json.dumps({"error": traceback.format_exc(limit=-8)}), flush=True)
    os._exit(0)  # the threads of a device that is none cannot be joined


if __name__ == "__main__":
    main()
