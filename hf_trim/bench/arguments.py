"""What `python -m hf_trim.bench` measures: the options of its command line."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from hf_trim.messages import check_choice


MODEL_CHOICES = (
    "bert", "gpt2", "llama", "vit", "convnext", "convnextv2", "swin", "t5", "bert-base", "vit-base", "llama-1b",
    "lm-head", "gpt2-lm",
)  # fmt: skip
TOKEN_MODELS = ("lm-head", "gpt2-lm")  # trimmed by tokens, the others by samples
MODES = ("dense", "sparse", "replay")
DTYPES = ("float32", "bfloat16")
HEAD_SIZE = 64  # of attention


@dataclass
class BenchArguments:
    """
    What is measured, and how often.

    Args:
        models (`list[str]`): Names of models. `bert`, `gpt2`, `llama`, `vit`, `convnext`, `convnextv2`, `swin` and
            `t5` have the size that `layers` and `hidden_size` say, `bert-base`, `vit-base` and `llama-1b` their own;
            `gpt2-lm` (a language model) and `lm-head` (its last layer alone) are trimmed by tokens, with all logits
            (`dense`) or with chunks of them (`sparse`). Only the last layer of a language model shrinks with p, so it
            stays below the bound.
        keep (`list[float]`): Fractions p of the batch to keep.
        modes (`list[str]`): Backward passes; `dense` is the reference, and always runs.
        batch_size (`int`): Samples a step.
        seq_length (`int`): Tokens a sample of text; images have the size of their model (ViT 32 × 32,
            ConvNeXt and Swin 64 × 64, ViT-base 224 × 224).
        layers (`int`): Layers of the models without a size of their own.
        hidden_size (`int`): Their width, a multiple of 64 (the size of an attention head).
        vocab_size (`int`, *optional*): Their vocabulary; the default is that of the published model.
        dtype (`str`): `float32`, or `bfloat16` by autocast.
        dropout (`float`, *optional*): Dropout of states and attention, as far as the model has it (ConvNeXt: drop
            path); the default is that of the published model.
        gradient_checkpointing (`bool`): Recompute the activations of each layer in the backward pass.
        torch_compile (`bool`): Also measure each mode in the model compiled by inductor, with a dynamic batch size.
        repeats (`int`): Rounds that count; each runs every mode at every p once, in random order.
        schedule_epochs (`int`): Epochs of the schedule 1.0 → 0.2 whose speed-up is predicted from the measured steps.
        device (`str`): `cpu` or `cuda`.
        trainer (`bool`): Compare steps of `Trainer` and of `TrimmingTrainer` with p = 1 instead; in several processes
            also the selection among the items of one process with that among the items of all.
        output (`str`): JSON file of all that was measured.
    """

    models: list[str] = field(
        default_factory=lambda: ["bert", "gpt2", "llama", "vit", "convnext"],
        metadata={"help": f"Any of {', '.join(MODEL_CHOICES)}."},
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
        for name, choices in (("models", MODEL_CHOICES), ("modes", MODES)):
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
        for name in ("convnext", "convnextv2"):
            if self.gradient_checkpointing and name in self.models:
                raise ValueError(f"gradient_checkpointing: transformers has none for {name}; leave it out of models.")
        if Path(self.output).is_dir():
            raise ValueError(f"output must be a file, and {self.output} is a folder.")
        self.keep = sorted(set(self.keep))
        self.models = list(dict.fromkeys(self.models))
        self.modes = [mode for mode in MODES if mode in self.modes or mode == "dense"]
