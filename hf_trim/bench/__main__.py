"""`python -m hf_trim.bench`: time, memory and gradients of a training step, for each backward pass and each p."""

import gc
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median, quantiles
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    HfArgumentParser,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_trim.backward.compiled.backend import mark_batch_dynamic
from hf_trim.backward.replay import rows_of
from hf_trim.backward.settings import fallback_report, reset_fallbacks
from hf_trim.bench.trainer import overhead, time_selection, time_trainers
from hf_trim.environment import hardware, versions
from hf_trim.files import write_json
from hf_trim.messages import check_choice
from hf_trim.processes import leave_process_group
from hf_trim.report.__main__ import print_wide
from hf_trim.trainer.functional import trimmed_linear_cross_entropy, trimmed_mean
from hf_trim.trainer.schedule import linear_fraction
from hf_trim.trainer.selection import num_kept


MODES = ("dense", "sparse", "replay")
COMPILED = "compiled "  # in front of the mode of a compiled model
DTYPES = ("float32", "bfloat16")
HEAD_SIZE = 64  # of attention
NUM_LABELS = 10
SCHEDULE = (1.0, 0.2)  # the paper's


@dataclass
class BenchArguments:
    """
    What is measured, and how often.

    Args:
        models (`list[str]`): Names of models. `bert`, `gpt2`, `llama`, `vit` and `convnext` have the size that
            `layers` and `hidden_size` say, `bert-base`, `vit-base` and `llama-1b` their own; `gpt2-lm`
            (a language model) and `lm-head` (its last layer alone) are trimmed by tokens, with whole logits (`dense`)
            or in chunks (`sparse`); as the rest of a language model does not shrink with p, it stays below the bound.
        keep (`list[float]`): Fractions p of the batch to keep.
        modes (`list[str]`): Backward passes; `dense` is the reference, and always runs.
        batch_size (`int`): Samples a step.
        seq_length (`int`): Tokens a sample of text; images have the size of their model (ViT 32 × 32,
            ConvNeXt 64 × 64, ViT-base 224 × 224).
        layers (`int`): Layers of the models without a size of their own.
        hidden_size (`int`): Their width, a multiple of 64 (the size of an attention head).
        vocab_size (`int`, *optional*): Their vocabulary; the default is that of the published model.
        dtype (`str`): `float32`, or `bfloat16` by autocast.
        dropout (`float`, *optional*): Dropout of states and attention, as far as the model has it (ConvNeXt: drop
            path); the default is that of the published model.
        gradient_checkpointing (`bool`): Recompute the activations of each layer in the backward pass.
        torch_compile (`bool`): Also measure each mode in the model compiled by inductor, with a dynamic batch size.
        repeats (`int`): Rounds that count; each runs every mode at every p once, in random order.
        schedule_epochs (`int`): Epochs of the schedule 1.0 → 0.2 whose speed-up is predicted from the cells.
        device (`str`): `cpu` or `cuda`.
        trainer (`bool`): Instead, compare steps of `Trainer` and of `TrimmingTrainer` with p = 1; in several processes
            also the choice of the hardest among the items of one and of all.
        output (`str`): JSON file of all that was measured.
    """

    models: list[str] = field(
        default_factory=lambda: ["bert", "gpt2", "llama", "vit", "convnext"],
        metadata={"help": "bert, gpt2, llama, vit, convnext, gpt2-lm, lm-head; bert-base, vit-base, llama-1b."},
    )
    keep: list[float] = field(
        default_factory=lambda: [0.2, 0.4, 0.6, 0.8, 1.0], metadata={"help": "Fractions p of the batch to keep."}
    )
    modes: list[str] = field(
        default_factory=lambda: list(MODES),
        metadata={"help": "Backward passes: dense (the reference, always runs), sparse, replay."},
    )
    batch_size: int = field(default=32, metadata={"help": "Samples a step."})
    seq_length: int = field(default=64, metadata={"help": "Tokens a sample of text."})
    layers: int = field(default=6, metadata={"help": "Layers of the models without a size of their own."})
    hidden_size: int = field(default=384, metadata={"help": "Their width, a multiple of 64."})
    vocab_size: int | None = field(
        default=None, metadata={"help": "Their vocabulary. Default: that of the published model."}
    )
    dtype: str = field(default="float32", metadata={"help": "float32, or bfloat16 by autocast."})
    dropout: float | None = field(
        default=None,
        metadata={"help": "Dropout of states and attention; of paths in ConvNeXt. Default: the published model's."},
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute the activations of each layer in the backward pass."}
    )
    torch_compile: bool = field(
        default=False, metadata={"help": "Also measure each mode in the compiled model (samples only)."}
    )
    repeats: int = field(
        default=7, metadata={"help": "Rounds that count; each runs every mode at every p once, in random order."}
    )
    schedule_epochs: int = field(
        default=5, metadata={"help": "Epochs of the schedule 1.0 to 0.2 whose speed-up is predicted."}
    )
    device: str = field(
        default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cpu or cuda."}
    )
    trainer: bool = field(
        default=False, metadata={"help": "Instead, compare steps of Trainer and of TrimmingTrainer with p = 1."}
    )
    output: str = field(default="bench.json", metadata={"help": "JSON file of all that was measured."})

    def __post_init__(self):
        for name, choices in (("models", MODELS), ("modes", MODES)):
            for value in getattr(self, name):
                check_choice(name, value, choices)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("device", self.device, ("cpu", "cuda"))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, and torch finds no CUDA device: use --device cpu.")
        for value in self.keep:
            if not 0 < value <= 1:
                raise ValueError(f"keep must be fractions in (0, 1], and one is {value}: 0.2 keeps the hardest fifth.")
        for name in ("batch_size", "seq_length", "layers", "repeats", "schedule_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, and is {getattr(self, name)}.")
        if self.hidden_size < HEAD_SIZE or self.hidden_size % HEAD_SIZE:
            raise ValueError(f"hidden_size must be a multiple of {HEAD_SIZE}, and is {self.hidden_size}.")
        if self.vocab_size is not None and self.vocab_size < 2:
            raise ValueError(f"vocab_size must be at least 2 (one token is padding), and is {self.vocab_size}.")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), and is {self.dropout}.")
        if self.gradient_checkpointing and "convnext" in self.models:
            raise ValueError("gradient_checkpointing: transformers has none for convnext; leave it out of models.")
        if Path(self.output).is_dir():
            raise ValueError(f"output must be a file, and {self.output} is a folder.")
        self.keep = sorted(set(self.keep))
        self.models = list(dict.fromkeys(self.models))
        self.modes = [mode for mode in MODES if mode in self.modes or mode == "dense"]


# ---- models and their batches ------------------------------------------------------------------------------------


def _sizes(args: BenchArguments) -> dict:
    return {
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden_size // HEAD_SIZE,
        "intermediate_size": 4 * args.hidden_size,
    }


def _vocabulary(args: BenchArguments) -> dict:
    return {} if args.vocab_size is None else {"vocab_size": args.vocab_size}


def _dropout(args: BenchArguments, *names: str) -> dict:
    return {} if args.dropout is None else dict.fromkeys(names, args.dropout)


def _bert(args: BenchArguments, **sizes) -> PreTrainedModel:
    config = BertConfig(
        **sizes,
        **_dropout(args, "hidden_dropout_prob", "attention_probs_dropout_prob"),
        max_position_embeddings=max(512, args.seq_length),
        num_labels=NUM_LABELS,
    )
    return BertForSequenceClassification._from_config(config, attn_implementation="sdpa")


def _gpt2(args: BenchArguments, model_class=GPT2ForSequenceClassification) -> PreTrainedModel:
    config = GPT2Config(
        n_embd=args.hidden_size,
        n_layer=args.layers,
        n_head=args.hidden_size // HEAD_SIZE,
        n_positions=max(1024, args.seq_length),
        pad_token_id=0,
        use_cache=False,
        num_labels=NUM_LABELS,
        **_vocabulary(args),
        **_dropout(args, "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    )
    return model_class._from_config(config, attn_implementation="sdpa")


def _llama(args: BenchArguments, **sizes) -> PreTrainedModel:
    dropout = _dropout(args, "attention_dropout")
    config = LlamaConfig(**sizes, **dropout, pad_token_id=0, use_cache=False, num_labels=NUM_LABELS)
    return LlamaForSequenceClassification._from_config(config, attn_implementation="sdpa")


def _vit(args: BenchArguments, **sizes) -> PreTrainedModel:
    config = ViTConfig(
        **sizes,
        **_dropout(args, "hidden_dropout_prob", "attention_probs_dropout_prob"),
        num_labels=NUM_LABELS,
    )
    return ViTForImageClassification._from_config(config, attn_implementation="sdpa")


def _convnext(args: BenchArguments) -> PreTrainedModel:
    config = ConvNextConfig(
        image_size=64,
        patch_size=2,
        hidden_sizes=[args.hidden_size // 8 * factor for factor in (1, 2, 4, 8)],
        depths=[1, 1, max(1, args.layers - 3), 1],
        **_dropout(args, "drop_path_rate"),
        num_labels=NUM_LABELS,
    )
    return ConvNextForImageClassification(config)


class LMHeadOnly(nn.Module):
    """The last layer of a language model with a vocabulary of 128,256, on inputs that want a gradient."""

    def __init__(self, args: BenchArguments):
        super().__init__()
        self.config = None
        self.tokens = nn.Parameter(torch.randn(args.batch_size * args.seq_length, args.hidden_size))
        self.head = nn.Linear(args.hidden_size, args.vocab_size or LLAMA_1B["vocab_size"], bias=False)


LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
MODELS: dict[str, Callable[[BenchArguments], PreTrainedModel]] = {
    "bert": lambda args: _bert(args, **_sizes(args), **_vocabulary(args)),
    "gpt2": _gpt2,
    "llama": lambda args: _llama(
        args, **{**_sizes(args), "intermediate_size": args.hidden_size * 8 // 3}, **_vocabulary(args)
    ),
    "vit": lambda args: _vit(args, **_sizes(args), image_size=32, patch_size=4),
    "convnext": _convnext,
    "bert-base": _bert,
    "vit-base": _vit,
    "llama-1b": lambda args: _llama(args, **LLAMA_1B),
    "lm-head": LMHeadOnly,
    "gpt2-lm": lambda args: _gpt2(args, GPT2LMHeadModel),
}
TOKEN_MODELS = ("lm-head", "gpt2-lm")


def build_model(name: str, args: BenchArguments) -> PreTrainedModel:
    """
    A model in training mode, with random weights.

    Args:
        name (`str`): One of `MODELS`.
        args ([`BenchArguments`]): Sizes, dropout, device.

    Returns:
        `PreTrainedModel`: A classifier of texts or images.
    """
    torch.manual_seed(0)
    model = MODELS[name](args).to(args.device).train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def random_batch(config, args: BenchArguments) -> dict[str, Tensor]:
    """
    A batch without padding.

    Args:
        config (`PreTrainedConfig`): The model's configuration.
        args ([`BenchArguments`]): Sizes, device.

    Returns:
        `dict[str, Tensor]`: `labels`, and `input_ids` or `pixel_values`.
    """
    generator = torch.Generator().manual_seed(1)
    if config is None:  # the inputs are the model's
        shape = (args.batch_size * args.seq_length,)
        vocabulary = args.vocab_size or LLAMA_1B["vocab_size"]
        return {"labels": torch.randint(vocabulary, shape, generator=generator).to(args.device)}
    if hasattr(config, "image_size"):
        shape = (args.batch_size, config.num_channels, config.image_size, config.image_size)
        batch = {"pixel_values": torch.randn(shape, generator=generator)}
    else:  # 0 is the padding token
        shape = (args.batch_size, args.seq_length)
        batch = {"input_ids": torch.randint(1, config.vocab_size, shape, generator=generator)}
    batch["labels"] = torch.randint(NUM_LABELS, (args.batch_size,), generator=generator)
    return {name: value.to(args.device) for name, value in batch.items()}


# ---- steps and what is measured of them --------------------------------------------------------------------------


class Cell(NamedTuple):
    """
    One kind of step.

    Args:
        mode (`str`): `"untrimmed"` (the mean of all losses), `"dense"`, `"sparse"`, `"replay"`, or one of these three
            after `"compiled "`.
        keep (`float`): The fraction p.
    """

    mode: str
    keep: float

    @property
    def backward(self) -> str:
        """The backward pass."""
        return self.mode.removeprefix(COMPILED)

    @property
    def is_compiled(self) -> bool:
        """Whether the model is compiled."""
        return self.mode.startswith(COMPILED)

    @property
    def dense(self) -> "Cell":
        """The reference that it is compared with."""
        return self if self.mode == "untrimmed" else Cell(COMPILED * self.is_compiled + "dense", self.keep)


UNTRIMMED = Cell("untrimmed", 1.0)


class Steps:
    """
    Training steps of one model on one batch, without an optimizer.

    Args:
        model (`torch.nn.Module`): The model, in training mode.
        batch (`dict[str, Tensor]`): Its inputs, and `labels`.
        dtype (`str`): `"float32"`, or `"bfloat16"` by autocast.
    """

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], dtype: str):
        self.model, self.batch, self.dtype = model, batch, dtype
        self.compiled = torch.compile(model, backend="hf_trim")
        self.device = batch["labels"].device.type
        self.size = batch["labels"].shape[0]

    def losses(self, kept: Tensor | None = None, compiled: bool = False) -> Tensor:
        """
        Args:
            kept (`Tensor`, *optional*): Indices of samples; the default is all.
            compiled (`bool`, *optional*, defaults to `False`): Whether to call the compiled model.

        Returns:
            `Tensor`: Their losses.
        """
        inputs = dict(self.batch) if kept is None else rows_of(self.batch, kept, self.size)
        labels = inputs.pop("labels")
        if compiled:
            mark_batch_dynamic(inputs, len(labels))
        model = self.compiled if compiled else self.model
        return F.cross_entropy(model(**inputs).logits.float(), labels, reduction="none")

    def prepare(self, seed: int) -> None:
        """
        Forget the gradients and set the random state that dropout masks, and so the kept samples, follow from.

        Args:
            seed (`int`): The seed.
        """
        self.model.zero_grad(set_to_none=True)
        torch.manual_seed(seed)

    def forward(self, cell: Cell) -> Tensor:
        """
        Args:
            cell ([`Cell`]): What to do.

        Returns:
            `Tensor`: The loss to call `backward` of.
        """
        autocast = self.dtype == "bfloat16"
        with torch.autocast(self.device, torch.bfloat16) if autocast else nullcontext():
            if cell.mode == "untrimmed":
                return self.losses().mean()
            losses_of = partial(self.losses, compiled=cell.is_compiled)
            if cell.backward == "replay":
                return trimmed_mean(losses_of, cell.keep, backward="replay", model=self.model)
            return trimmed_mean(losses_of(), cell.keep, backward=cell.backward)


class TokenSteps(Steps):
    """Steps of a language model, trimmed by tokens: with whole logits, or (`sparse`) with chunks of them."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], dtype: str):
        super().__init__(model, batch, dtype)
        self.target = batch["input_ids"][:, 1:] if "input_ids" in batch else batch["labels"]
        self.size = self.target.numel()

    def _head(self) -> tuple[Tensor, Tensor]:
        """Inputs and weight of the last layer."""
        if isinstance(self.model, LMHeadOnly):
            return self.model.tokens, self.model.head.weight
        hidden = self.model.transformer(self.batch["input_ids"]).last_hidden_state
        return hidden[:, :-1], self.model.lm_head.weight

    def losses(self, kept: Tensor | None = None, compiled: bool = False) -> Tensor:
        logits = F.linear(*self._head()).flatten(0, -2)
        return F.cross_entropy(logits.float(), self.target.flatten(), reduction="none")

    def forward(self, cell: Cell) -> Tensor:
        if cell.mode != "sparse":
            return super().forward(cell)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            return trimmed_linear_cross_entropy(*self._head(), self.target, cell.keep)


def time_step(steps: Steps, cell: Cell, seed: int) -> tuple[float, float]:
    """
    Time a step. On a GPU events mark forward's end, so that the host runs ahead as it does in training.

    Args:
        steps ([`Steps`]): The model.
        cell ([`Cell`]): The kind of step.
        seed (`int`): Seed of dropout.

    Returns:
        `tuple[float, float]`: Seconds of forward (selection included; for replay: scoring too) and backward.
    """
    steps.prepare(seed)
    if steps.device == "cpu":
        start = time.perf_counter()
        loss = steps.forward(cell)
        middle = time.perf_counter()
        loss.backward()
        return middle - start, time.perf_counter() - middle
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    torch.cuda.synchronize()
    marks[0].record()
    loss = steps.forward(cell)
    marks[1].record()
    loss.backward()
    marks[2].record()
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]) / 1000, marks[1].elapsed_time(marks[2]) / 1000


def time_cells(steps: Steps, cells: list[Cell], repeats: int) -> dict[Cell, list[tuple[float, float]]]:
    """
    Time all kinds of steps, interleaved, in an order that changes; a first round warms up and does not count.

    Args:
        steps ([`Steps`]): The model.
        cells (`list[Cell]`): The kinds of steps.
        repeats (`int`): Rounds that count.

    Returns:
        `dict[Cell, list[tuple[float, float]]]`: Seconds of forward and backward, round by round.
    """
    seconds: dict = {cell: [] for cell in cells}
    order = random.Random(0)
    for seed in range(repeats + 1):
        for cell in order.sample(cells, len(cells)):
            seconds[cell].append(time_step(steps, cell, seed))
    return {cell: times[1:] for cell, times in seconds.items()}


def peak_memory(steps: Steps, cell: Cell) -> int:
    """
    The highest sum of the tensors that a step makes: activations, gradients and what lives for a moment.

    Args:
        steps ([`Steps`]): The model.
        cell ([`Cell`]): The kind of step.

    Returns:
        `int`: Bytes beyond weights and inputs.
    """
    steps.prepare(seed=0)
    gc.collect()
    if steps.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        steps.forward(cell).backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler announces itself
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        steps.forward(cell).backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):  # a positive size when made, negative when freed
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def gradients(steps: Steps, cell: Cell) -> list[Tensor]:
    """
    Args:
        steps ([`Steps`]): The model.
        cell ([`Cell`]): The kind of step.

    Returns:
        `list[Tensor]`: The gradient of each parameter; zeros if it has none.
    """
    steps.prepare(seed=0)
    steps.forward(cell).backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in steps.model.parameters()]
    steps.model.zero_grad(set_to_none=True)
    return found


def relative_error(found: list[Tensor], reference: list[Tensor]) -> float:
    """
    Args:
        found (`list[Tensor]`): Gradients.
        reference (`list[Tensor]`): What they should be.

    Returns:
        `float`: Norm of the difference over the norm of the reference, over all parameters together.
    """
    difference = [float(torch.linalg.vector_norm(a - b)) for a, b in zip(found, reference, strict=True)]
    norm = [float(torch.linalg.vector_norm(b)) for b in reference]
    return sum(x * x for x in difference) ** 0.5 / sum(x * x for x in norm) ** 0.5


def check_cells(steps: Steps, cells: list[Cell]) -> dict[Cell, dict]:
    """
    Compare gradients with those of the dense pass on the same forward pass, count fallbacks, and measure memory.

    Args:
        steps ([`Steps`]): The model.
        cells (`list[Cell]`): The kinds of steps; at each p dense comes first.

    Returns:
        `dict[Cell, dict]`: `gradient_error` (or `None`), `fallbacks`, `peak_memory_bytes`, and `first_seconds` of the
        first step, in which a compiled model is compiled if no cell before did so.
    """
    checks, reference = {}, None
    with torch.no_grad():
        draws = [(steps.prepare(seed), steps.losses())[1] for seed in (0, 1)]
    deterministic = torch.equal(*draws)  # with dropout, replay draws masks of its own
    for cell in cells:
        reset_fallbacks()
        error, start = None, time.perf_counter()
        found = gradients(steps, cell)
        first = time.perf_counter() - start
        if cell.backward == "dense":
            reference, error = found, 0.0
        elif cell.backward == "sparse" or (cell.backward == "replay" and deterministic):
            error = relative_error(found, reference)
        del found
        checks[cell] = {"gradient_error": error, "fallbacks": fallback_report(), "first_seconds": first}
    del reference
    for cell in cells:  # with no reference in memory
        checks[cell]["peak_memory_bytes"] = peak_memory(steps, cell)
    return checks


# ---- summary -----------------------------------------------------------------------------------------------------


def bound(mode: str, kept_fraction: float, forward: float, backward: float) -> float:
    """
    The highest speed-up over a dense step that a backward pass can have if all of it shrinks with p. With gradient
    checkpointing the same holds: the dense backward pass contains the second forward pass, b = f + b'.

    Args:
        mode (`str`): `"untrimmed"`, `"dense"`, `"sparse"` or `"replay"`, of the compiled model or not.
        kept_fraction (`float`): k / B.
        forward (`float`): Time f of the forward pass.
        backward (`float`): Time b of the dense backward pass, what it recomputes included.

    Returns:
        `float`: (f + b) / (f + p·b) for sparse, (f + b) / (f + p·(f + b)) for replay, 1 for dense.
    """
    dense, mode = forward + backward, mode.removeprefix(COMPILED)
    if mode == "sparse":
        return dense / (forward + kept_fraction * backward)
    if mode == "replay":
        return dense / (forward + kept_fraction * dense)
    return 1.0


def spread(values: list[float]) -> dict[str, float]:
    """
    Args:
        values (`list[float]`): At least one number.

    Returns:
        `dict[str, float]`: `median` and `iqr` (the interquartile range; 0 for a single number).
    """
    quartiles = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [0.0, 0.0, 0.0]
    return {"median": median(values), "iqr": quartiles[2] - quartiles[0]}


def summarize(seconds: dict[Cell, list[tuple[float, float]]], batch_size: int) -> tuple[dict, list[dict]]:
    """
    Args:
        seconds (`dict[Cell, list[tuple[float, float]]]`): Seconds of forward and backward, round by round.
        batch_size (`int`): Samples a step.

    Returns:
        `tuple[dict, list[dict]]`: Medians of the dense `forward` and `backward` (of all p, and untrimmed) in seconds,
        `compiled_forward` and `compiled_backward` if measured; and for each cell its times, its speed-ups (medians
        over the rounds of the ratio within a round) and its bound.
    """

    def dense_of(compiled: bool) -> dict[str, float]:
        found = [
            times
            for cell, rounds in seconds.items()
            if cell.backward in ("untrimmed", "dense") and cell.is_compiled == compiled
            for times in rounds
        ]
        return {"forward": median(f for f, _ in found), "backward": median(b for _, b in found)}

    dense = {compiled: dense_of(compiled) for compiled in {cell.is_compiled for cell in seconds}}

    def speedup(cell: Cell, reference: Cell) -> float:
        pairs = zip(seconds[reference], seconds[cell], strict=True)
        return median(sum(slow) / sum(fast) for slow, fast in pairs)

    rows = []
    for cell, times in seconds.items():
        k = num_kept(cell.keep, batch_size)
        limit = bound(cell.mode, k / batch_size, **dense[cell.is_compiled])
        ratio = speedup(cell, cell.dense)
        rows.append(
            {
                "mode": cell.mode,
                "keep": cell.keep,
                "k": k,
                "kept_fraction": k / batch_size,
                "forward": spread([f for f, _ in times]),
                "backward": spread([b for _, b in times]),
                "step": spread([f + b for f, b in times]),
                "speedup_to_dense": ratio,
                "speedup_to_untrimmed": speedup(cell, UNTRIMMED),
                "bound": limit,
                "fraction_of_bound": ratio / limit,
                "rounds": times,
            }
        )
    compiled = {f"compiled_{name}": value for name, value in dense.get(True, {}).items()}
    return {**dense[False], **compiled}, rows


def schedule_speedup(rows: list[dict], epochs: int) -> dict[str, float]:
    """
    What the cells predict for training with p falling from 1.0 to 0.2, without optimizer and data.

    Args:
        rows (`list[dict]`): The cells of one model.
        epochs (`int`): Number of epochs; p falls linearly from the first to the last.

    Returns:
        `dict[str, float]`: Speed-up over untrimmed training, per mode; empty unless both ends were measured. Between
        the measured p the time is interpolated; an epoch with p = 1 is a plain one.
    """
    start, end = SCHEDULE
    fractions = [linear_fraction(epoch, epochs, start, end) for epoch in range(epochs)]
    speedups = {}
    for mode in dict.fromkeys(row["mode"] for row in rows if row["mode"] != "untrimmed"):
        times = {row["keep"]: 1 / row["speedup_to_untrimmed"] for row in rows if row["mode"] == mode}
        if min(times) > end or max(times) < start:
            return {}
        keep = sorted(times)
        predicted = [1.0 if p == 1 else float(np.interp(p, keep, [times[k] for k in keep])) for p in fractions]
        speedups[mode] = 1 / mean(predicted)
    return speedups


HEADS = (
    "p", "k", "mode", "forward\nms", "backward\nms", "step\nms", "to\ndense", "bound", "of\nbound", "to un-\ntrimmed",
    "peak\nMB", "error",
)  # fmt: skip


def make_table(name: str, result: dict, args: BenchArguments) -> Table:
    """
    Args:
        name (`str`): The model.
        result (`dict`): What was measured of it.
        args ([`BenchArguments`]): Sizes.

    Returns:
        `rich.table.Table`: A row per p and mode.
    """
    title = f"{name}: {result['parameters'] / 1e6:.1f}M parameters, batch {args.batch_size}, {args.dtype}"
    if args.gradient_checkpointing:
        title += ", gradient checkpointing"
    schedule = ", ".join(f"{mode} {speedup:.2f}×" for mode, speedup in result["schedule_speedup"].items())
    caption = (
        "Medians; step ± interquartile range. Speed-ups: medians of the ratios within a round. Peak: beyond weights."
    )
    if schedule:
        caption += f"\nSchedule 1.0 → 0.2 in {args.schedule_epochs} epochs, without the optimizer: {schedule}"
    counted = sum(sum(row["fallbacks"].values()) for row in result["cells"])
    if args.torch_compile:
        firsts = [f"{row['mode']} {row['first_seconds']:.1f} s" for row in result["cells"] if row["first_seconds"] > 2]
        caption += f"\nFirst steps that took more than 2 s, compilation included: {', '.join(firsts) or 'none'}"
    caption += f"\nOps without a row-sparse rule that ran dense: {counted or 'none'}"
    table = Table(title=title, caption=caption)
    for head in HEADS:
        table.add_column(head, justify="left" if head == "mode" else "right", no_wrap=True)
    last = result["cells"][-1]["mode"]
    for row in result["cells"]:
        limited = row["mode"].removeprefix(COMPILED) in ("sparse", "replay")
        error = row["gradient_error"] if limited else None
        table.add_row(
            f"{row['keep']:g}",
            str(row["k"]),
            row["mode"],
            f"{row['forward']['median'] * 1000:.1f}",
            f"{row['backward']['median'] * 1000:.1f}",
            f"{row['step']['median'] * 1000:.1f} ± {row['step']['iqr'] * 1000:.1f}",
            f"{row['speedup_to_dense']:.2f}×",
            f"{row['bound']:.2f}×" if limited else "–",
            f"{row['fraction_of_bound'] * 100:.0f} %" if limited else "–",
            f"{row['speedup_to_untrimmed']:.2f}×",
            f"{row['peak_memory_bytes'] / 1e6:.1f}",
            "–" if error is None else f"{error:.0e}",
            end_section=row["mode"] in ("untrimmed", last),
        )
    return table


def bench_model(name: str, args: BenchArguments) -> dict:
    """
    Measure one model, and print its table.

    Args:
        name (`str`): One of `MODELS`.
        args ([`BenchArguments`]): What to measure.

    Returns:
        `dict`: What the JSON holds of it; times in seconds.
    """
    torch._dynamo.reset()  # models share code, of which it compiles a limited number of variants
    model = build_model(name, args)
    steps_class, modes = (TokenSteps, MODES[:2]) if name in TOKEN_MODELS else (Steps, MODES)
    steps = steps_class(model, random_batch(model.config, args), args.dtype)
    modes = [mode for mode in args.modes if mode in modes]
    if args.torch_compile and name not in TOKEN_MODELS:
        modes += [COMPILED + mode for mode in modes]
    cells = [UNTRIMMED, *(Cell(mode, keep) for keep in args.keep for mode in modes)]
    checks = check_cells(steps, cells)
    dense, rows = summarize(time_cells(steps, cells, args.repeats), steps.size)
    result = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dense_seconds": dense,
        "cells": [{**row, **check} for row, check in zip(rows, checks.values(), strict=True)],
        "schedule_speedup": schedule_speedup(rows, args.schedule_epochs),
    }
    print_wide(make_table(name, result, args))
    for row in result["cells"]:
        for op, count in row["fallbacks"].items():
            print(f"{name}, p = {row['keep']:g}: {op} ran dense {count} times.", file=sys.stderr)
    return result


def bench_trainer(name: str, args: BenchArguments) -> dict:
    """
    Measure what trimming adds to a step while nothing is trimmed, and print it.

    Args:
        name (`str`): One of `MODELS`.
        args ([`BenchArguments`]): What to measure.

    Returns:
        `dict`: What the JSON holds of it; times in seconds.
    """
    model = build_model(name, args)
    batch = random_batch(model.config, args)
    seconds = time_trainers(model, batch, args.repeats, args.device == "cpu", args.dtype == "bfloat16")
    result = overhead(seconds)
    print(
        f"{name}: Trainer {1000 * result['plain_seconds']:.1f} ms, TrimmingTrainer at p = 1 "
        f"{1000 * result['trimming_seconds']:.1f} ms a step: {result['ratio']:.3f}× (quartiles "
        f"{result['ratio_low']:.3f} … {result['ratio_high']:.3f})"
    )
    if PartialState().num_processes > 1:
        result["selection"] = time_selection(args.batch_size, args.repeats)
        print(", ".join(f"{scope} choice {1e6 * value:.0f} µs" for scope, value in result["selection"].items()))
    return result


def main(argv: list[str] | None = None) -> int:
    """
    The command line. The JSON file is written anew after each model.

    Args:
        argv (`list[str]`, *optional*): Arguments; the default is `sys.argv[1:]`.

    Returns:
        `int`: Exit status 0; with wrong arguments the process exits with 2.
    """
    parser = HfArgumentParser(BenchArguments, prog="python -m hf_trim.bench", allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except ValueError as error:
        parser.error(str(error))
    settings = {name: value for name, value in asdict(args).items() if name != "output"}
    results: dict = {}
    content = {"arguments": settings, "hardware": hardware(), "versions": versions(), "models": results}
    for name in args.models:
        results[name] = bench_trainer(name, args) if args.trainer else bench_model(name, args)
        write_json(Path(args.output), content)
    return 0


if __name__ == "__main__":
    status = main()
    leave_process_group()
    sys.exit(status)
