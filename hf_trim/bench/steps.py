"""
Training steps of each kind, and their times.

A batch of B samples → losses `[B]` → the scalar mean over the kept → gradients of the weights.
"""

import random
import time
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_trim.backward.compiled.backend import mark_batch_dynamic
from hf_trim.backward.replay import rows_of
from hf_trim.backward.settings import taped
from hf_trim.bench.models import LMHeadOnly
from hf_trim.trainer.functional import trimmed_linear_cross_entropy, trimmed_mean


COMPILED = "compiled "  # in front of the mode of a compiled model


class StepKind(NamedTuple):
    """
    A way to make a training step.

    Args:
        mode (`str`): `"untrimmed"` (the mean of all losses), `"dense"`, `"sparse"`, `"replay"`, or one of these three
            after `"compiled "`.
        keep (`float`): The kept fraction p.
    """

    mode: str
    keep: float

    @property
    def backward(self) -> str:
        """The mode without `"compiled "`."""
        return self.mode.removeprefix(COMPILED)

    @property
    def is_compiled(self) -> bool:
        """Whether the model is compiled."""
        return self.mode.startswith(COMPILED)

    @property
    def reference(self) -> "StepKind":
        """The step that this one is compared with: the dense one at the same p, compiled if this one is."""
        return self if self.mode == "untrimmed" else StepKind(COMPILED * self.is_compiled + "dense", self.keep)


UNTRIMMED = StepKind("untrimmed", 1.0)


class Steps:
    """
    Training steps of one model on one batch, without an optimizer.

    Args:
        model (`torch.nn.Module`): The model, in training mode.
        batch (`dict[str, torch.Tensor]`): Its inputs, `[B, ...]`, and `labels` `[B]`.
        dtype (`str`): `"float32"`, or `"bfloat16"` by autocast.
    """

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], dtype: str):
        self.model, self.batch, self.dtype = model, batch, dtype
        self.compiled = torch.compile(model, backend="hf_trim")  # nothing is compiled before it is called
        self.device = batch["labels"].device.type
        self.size = batch["labels"].shape[0]

    def losses(self, kept: Tensor | None = None, compiled: bool = False) -> Tensor:
        """
        Args:
            kept (`torch.Tensor`, *optional*): `[k]`, indices of samples; the default is all.
            compiled (`bool`, *optional*, defaults to `False`): Whether to call the compiled model.

        Returns:
            `torch.Tensor`: Their losses, `[k]` or `[B]`.
        """
        inputs = dict(self.batch) if kept is None else rows_of(self.batch, kept, self.size)
        labels = inputs.pop("labels")
        if compiled:  # replay calls the model with B samples and with k
            mark_batch_dynamic(inputs, len(labels))
        model = self.compiled if compiled else self.model
        return F.cross_entropy(model(**inputs).logits.float(), labels, reduction="none")

    def prepare(self, seed: int) -> None:
        """
        Delete the gradients and set the random state. Dropout masks, and so the kept samples, depend on it.

        Args:
            seed (`int`): The seed.
        """
        self.model.zero_grad(set_to_none=True)
        torch.manual_seed(seed)

    def forward(self, kind: StepKind) -> Tensor:
        """
        Run the forward pass of a step, with the selection of the kept samples.

        Args:
            kind ([`StepKind`]): What to do.

        Returns:
            `torch.Tensor`: The scalar loss; its `backward` is the rest of the step.
        """
        autocast = self.dtype == "bfloat16"
        with torch.autocast(self.device, torch.bfloat16) if autocast else nullcontext():
            if kind.mode == "untrimmed":
                return self.losses().mean()
            losses_of = partial(self.losses, compiled=kind.is_compiled)
            if kind.backward == "replay":
                return trimmed_mean(losses_of, kind.keep, backward="replay", model=self.model)
            with taped():
                return trimmed_mean(losses_of(), kind.keep, backward=kind.backward)


class TokenSteps(Steps):
    """
    Steps of a language model, trimmed by its B·T tokens: with all logits `[B·T, V]` in memory, or (`sparse`) with
    chunks of them.
    """

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], dtype: str):
        super().__init__(model, batch, dtype)
        # A token is predicted from those before it, and the first one has none.
        self.target = batch["input_ids"][:, 1:] if "input_ids" in batch else batch["labels"]
        self.size = self.target.numel()

    def _head_inputs(self) -> tuple[Tensor, Tensor]:
        """Inputs `[..., H]` and weight `[V, H]` of the last layer."""
        if isinstance(self.model, LMHeadOnly):
            return self.model.tokens, self.model.head.weight
        model: Any = self.model  # a language model of transformers
        hidden = model.transformer(self.batch["input_ids"]).last_hidden_state
        return hidden[:, :-1], model.lm_head.weight

    def losses(self, kept: Tensor | None = None, compiled: bool = False) -> Tensor:
        logits = F.linear(*self._head_inputs()).flatten(0, -2)
        return F.cross_entropy(logits.float(), self.target.flatten(), reduction="none")

    def forward(self, kind: StepKind) -> Tensor:
        if kind.mode != "sparse":
            return super().forward(kind)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            return trimmed_linear_cross_entropy(*self._head_inputs(), self.target, kind.keep)


def time_step(steps: Steps, kind: StepKind, seed: int) -> tuple[float, float]:
    """
    Time a step. On a GPU events mark the end of the forward pass: the host does not wait there, as in training.

    Args:
        steps ([`Steps`]): The model.
        kind ([`StepKind`]): What to do.
        seed (`int`): Seed of dropout.

    Returns:
        `tuple[float, float]`: Seconds of forward (selection included; for replay: scoring too) and backward.
    """
    steps.prepare(seed)
    if steps.device == "cpu":
        start = time.perf_counter()
        loss = steps.forward(kind)
        middle = time.perf_counter()
        loss.backward()
        return middle - start, time.perf_counter() - middle
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    torch.cuda.synchronize()
    events[0].record()
    loss = steps.forward(kind)
    events[1].record()
    loss.backward()
    events[2].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1000, events[1].elapsed_time(events[2]) / 1000


def time_steps(steps: Steps, kinds: list[StepKind], repeats: int) -> dict[StepKind, list[tuple[float, float]]]:
    """
    Time all kinds of steps, round by round. The order within a round is random, so that a disturbance or a rising
    temperature favours no kind. A first round warms up and does not count.

    Args:
        steps ([`Steps`]): The model.
        kinds (`list[StepKind]`): The kinds of steps.
        repeats (`int`): Rounds that count.

    Returns:
        `dict[StepKind, list[tuple[float, float]]]`: Seconds of forward and backward, round by round.
    """
    seconds: dict = {kind: [] for kind in kinds}
    order = random.Random(0)  # the same order in each run
    for seed in range(repeats + 1):
        for kind in order.sample(kinds, len(kinds)):
            seconds[kind].append(time_step(steps, kind, seed))
    return {kind: times[1:] for kind, times in seconds.items()}
