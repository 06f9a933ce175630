"""
Where a training step would make the host of a GPU wait, found on the CPU.

Counted are the operations that a CUDA host waits for: reading a number (`.item()`, `if tensor`, `.tolist()`), an index
whose size depends on values (boolean masks, `nonzero`, `unique`), comparisons of whole tensors, and copies of ordinary
memory to the device. hf_trim takes the ways that it takes on a GPU while this counts. For example, with samples and
accumulation 1, plain `Trainer` waits twice in a step, for whether the loss is finite: `{"is_nonzero": 2}`.

`python -m tests.support.waits` prints where each kind of training waits, beside plain `Trainer`. With `device="cuda"`
torch itself tells on a GPU what makes the host wait, e.g. `{"synchronization": 2}`.
"""

import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from unittest import mock

import hf_trim  # noqa: F401 (before transformers: it repairs torchvision where torch has no CUDA)


# isort: split
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_trim import TrimmingArguments, TrimmingTrainer
from hf_trim.backward import waiting
from hf_trim.bench.checks import SYNCHRONIZES
from hf_trim.trainer import lm_head
from tests.support.heads import HEADS, make
from tests.support.helpers import digits, tiny_vit


READS = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "unique_dim", "_unique", "_unique2",
    "unique_consecutive", "equal", "repeat_interleave", "bincount",
}  # fmt: skip
INDEXES = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}
# These read what was asked for early, what is on no device yet, and the CPU.
FREE = ("hf_trim/backward/waiting.py", "hf_trim/trainer/indices.py", "hf_trim/backward/facts/pointwise.py")
READERS = {Tensor.tolist, Tensor.numpy, Tensor.cpu}
FACTORIES = {
    torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.rand, torch.randn, torch.randperm,
    torch.tensor, torch.as_tensor, torch.from_numpy,
}  # fmt: skip


def _place() -> str:
    """The innermost line of hf_trim, transformers or accelerate that is running."""
    for frame in reversed(traceback.extract_stack()):
        for package in ("/hf_trim/", "/transformers/", "/accelerate/"):
            if package in frame.filename:
                name = frame.filename.rsplit(package, 1)[1]
                if name != "trainer/losses.py" or frame.name != "__torch_function__":
                    return f"{package[1:]}{name}:{frame.lineno} {frame.name}"
    return "?"


class Waits(Counter):
    """How often the host waits, for each operation and place: counted while [`is_on`] is true."""

    is_on = False
    mini_batches = 0

    def add(self, name: str) -> None:
        """Count an operation, unless what it reads was asked for early (`waiting.Later`) or is the host's own."""
        if self.is_on and not (place := _place()).startswith(FREE):
            self[name, place] += 1


class CudaWaits(Waits):
    """The same on a GPU."""

    @property
    def is_on(self) -> bool:
        return torch.cuda.get_sync_debug_mode() > 0

    @is_on.setter
    def is_on(self, value: bool) -> None:
        torch.cuda.set_sync_debug_mode("warn" if value else "default")

    def showwarning(self, message, *_: object) -> None:
        """In the place of `warnings.showwarning`."""
        if SYNCHRONIZES in str(message):
            self.add("synchronization")


class _Dispatched(TorchDispatchMode):
    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    @classmethod
    def is_infra_mode(cls):
        """Whether `torch.compile` compiles in this context. (It does not in others.)"""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in READS and not (name == "repeat_interleave" and isinstance(args[1], int)):
            self.waits.add(name)
        elif name in INDEXES and any(
            isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1] if x is not None
        ):
            self.waits.add(f"{name} by a mask")
        if any(kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented  # what such tensors do is counted, too: called from here, it would not be
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_on_host = bool(args) and (getattr(args[0], "is_on_host", False) if isinstance(args[0], Tensor) else True)
        if func in READERS and not is_on_host or func is Tensor.to and is_on_host or func is Tensor.new_tensor:
            self.waits.add(func.__name__)
        elif func in (torch.tensor, torch.as_tensor) and is_on_host and kwargs.get("device") is not None:
            self.waits.add(func.__name__)
        result = func(*args, **kwargs)
        if func is Tensor.to or func in FACTORIES and kwargs.get("device") is None and is_on_host:
            result.is_on_host = func is not Tensor.to
        return result


@contextmanager
def counted_waits(device: str = "cpu") -> Iterator[Waits]:
    """Counts in this context, in which hf_trim does as on a GPU."""
    if device == "cuda":
        waits = CudaWaits()
        with warnings.catch_warnings(), mock.patch.object(warnings, "showwarning", waits.showwarning):
            warnings.simplefilter("always")
            try:
                yield waits
            finally:
                waits.is_on = False
        return
    waits = Waits()
    with mock.patch.object(waiting, "reads_freely", lambda device: False), _Called(waits), _Dispatched(waits):
        yield waits


class _Window(TrainerCallback):
    """Counts in the second and third step: what is done once a training is not counted."""

    def __init__(self, waits: Waits):
        self.waits = waits

    def on_substep_end(self, args, state, control, **kwargs):
        self.waits.mini_batches += self.waits.is_on

    def on_step_end(self, args, state, control, **kwargs):
        self.waits.mini_batches += self.waits.is_on
        self.waits.is_on = state.global_step < 3
        control.should_training_stop = state.global_step == 3


def waits_of(trainer: Trainer) -> Waits:
    """
    Train for three steps, and count in two.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer.

    Returns:
        [`Waits`]: The operations of these steps.
    """
    with counted_waits(trainer.args.device.type) as waits:
        trainer.add_callback(_Window(waits))
        trainer.train()
    return waits


KEEP_HALF = {"trim_keep_start": 0.5, "trim_keep_end": 0.5}
ADAPTIVE = {"trim_schedule": "adaptive", "trim_mass": 0.7}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
# Of each kind of training: a head, and its arguments.
KINDS = {
    "samples, dense": ("vit", {**KEEP_HALF, "trim_backward": "dense"}),
    "samples, sparse": ("vit", {**KEEP_HALF, "trim_backward": "sparse"}),
    "samples, p = 1": ("vit", {}),
    "random": ("vit", {**KEEP_HALF, "trim_select": "random", "trim_backward": "dense"}),
    "the hardest left out": ("vit", {**KEEP_HALF, "trim_skip_hardest": 0.2, "trim_backward": "dense"}),
    "start and end of an answer": ("question-answering", {**KEEP_HALF, "trim_backward": "sparse"}),
    "one token of each text": ("decoder-classification", {**KEEP_HALF, "trim_backward": "sparse"}),
    "tokens, whole logits": ("llama", {**KEEP_HALF, "trim_backward": "dense"}),
    "tokens, chunked head": ("llama", KEEP_HALF),
    "tokens, chunked head, p = 1": ("llama", {}),
    "most tokens, chunked head": ("llama", {"trim_keep_start": 0.9, "trim_keep_end": 0.9}),
    "texts, chunked head, sparse": ("llama", {**KEEP_HALF, "trim_unit": "sample", "trim_backward": "sparse"}),
    "texts, experts, sparse": ("mixtral", {**KEEP_HALF, "trim_unit": "sample", "trim_backward": "sparse"}),
    "adaptive, samples, dense": ("vit", {**ADAPTIVE, "trim_backward": "dense"}),
    "adaptive, tokens, chunked head": ("llama", ADAPTIVE),
    "adaptive, samples, sparse": ("vit", {**ADAPTIVE, "trim_backward": "sparse"}),
    "NaN dropped": ("vit", {**KEEP_HALF, "trim_nonfinite": "drop", "trim_backward": "dense"}),
    "among all processes": ("llama", {**KEEP_HALF, "trim_scope": "global", "trim_backward": "dense"}),
    "samples, remembered": ("vit", {**KEEP_HALF, "trim_backward": "dense", "trim_memory": True}),
    "samples, nothing trimmed, remembered": ("vit", {"trim_select": "none", "trim_memory": True}),
    "tokens, chunked head, remembered": ("llama", {**KEEP_HALF, "trim_memory": True}),
    "compiled, one token of each text": (
        "decoder-classification",
        {**KEEP_HALF, **COMPILED, "trim_backward": "sparse"},
    ),
    "compiled, dense": ("vit", {**KEEP_HALF, **COMPILED, "trim_backward": "dense"}),
    "compiled, sparse": ("vit", {**KEEP_HALF, **COMPILED, "trim_backward": "sparse"}),
}
# Waits of a mini-batch beside those of plain Trainer: there the losses decide how many rows the backward pass has, or
# the experts which tokens of kept texts each gets.
EXPECTED = {
    "adaptive, samples, sparse": 1, "adaptive, tokens, chunked head": 1, "NaN dropped": 1,
    "most tokens, chunked head": 3, "texts, experts, sparse": 3,
}  # fmt: skip


def plain_kind(name: str) -> str:
    """A kind for which plain `Trainer` does the same as for this one: the waits of one do for both."""
    head, arguments = KINDS[name]
    return next(
        other for other, (its_head, its) in KINDS.items()
        if its_head == head and ("torch_compile" in its) == ("torch_compile" in arguments)
    )  # fmt: skip


def waits_of_kind(
    name: str, output_dir: str, accumulation: int = 1, is_trimmed: bool = True, device: str = "cpu"
) -> Waits:
    """
    The waits of a kind of training in two optimizer steps of its first epoch.

    Args:
        name (`str`): One of `KINDS`.
        output_dir (`str`): A folder.
        accumulation (`int`, *optional*, defaults to 1): Mini-batches of an optimizer step.
        is_trimmed (`bool`, *optional*, defaults to `True`): Whether it is trimmed; or plain `Trainer`'s training.
        device (`str`, *optional*, defaults to `"cpu"`): Where.

    Returns:
        [`Waits`]: The operations of these steps.
    """
    head, arguments = KINDS[name]
    model, rows = (tiny_vit(), digits(43)) if head == "vit" else (make(head), HEADS[head][1]())
    if "torch_compile" in arguments:  # else it is compiled again in the second step, when it has found this out
        model.config.problem_type = "single_label_classification"
    if not is_trimmed:
        arguments = {name: value for name, value in arguments.items() if name in COMPILED}
    kind, options = (TrimmingTrainer, TrimmingArguments) if is_trimmed else (Trainer, TrainingArguments)
    options = options(
        output_dir, per_device_train_batch_size=4, logging_steps=10**6, save_strategy="no", use_cpu=device == "cpu",
        disable_tqdm=True, report_to="none", remove_unused_columns=False, gradient_accumulation_steps=accumulation,
        **arguments,
    )  # fmt: skip
    with mock.patch.object(lm_head, "MIN_VOCABULARY", 8):
        return waits_of(kind(model, options, train_dataset=rows))


def main() -> None:
    """Print where each kind of training waits."""
    for name in sys.argv[1:] or KINDS:
        for accumulation in (1, 4):
            with TemporaryDirectory() as folder:
                plain, ours = (waits_of_kind(name, folder, accumulation, trims) for trims in (False, True))
            print(f"\n{name}, accumulation {accumulation}: {ours.total()}, plain Trainer {plain.total()}")
            for (operation, place), count in (ours - plain).most_common():
                print(f"  {count:4} {operation:25} {place}")


if __name__ == "__main__":
    main()
