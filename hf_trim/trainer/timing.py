"""
Step 4 (trimmed backward) of: batch → per-item losses → keep decision → trimmed backward → logs.

Whether the row-sparse backward pass is faster than the dense one depends on the model, its width and the device, and
only a clock tells. With `trim_backward="auto"` the first trimmed steps run the two in turn, and the faster is kept.
For example, 8 steps: dense, sparse, dense, sparse, ... of 40, 90 (its first, which prepares), 40, 25, ... ms: sparse.

The clock starts again when p has moved by a quarter towards the other one: dense was faster at p = 0.8, and p is 0.6.
The choice is part of `TrainerState`, so that a resumed training repeats it, and is the same in all processes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerState, TrainingArguments

from hf_trim.backward import waiting
from hf_trim.backward.eager.sparse import DENSE_ABOVE
from hf_trim.backward.waiting import Later
from hf_trim.trainer.arguments import TrimmingConfig
from hf_trim.trainer.kept_state import BACKWARD, kept_state


MODES = ("dense", "sparse")
TRIAL_STEPS = 8  # of which the first two, one of each, are not counted
UNTIMED = "asked for"  # as the reason of a choice that needs no message


def is_timed(args: TrainingArguments, trim: TrimmingConfig) -> bool:
    """
    Whether a clock may choose the backward pass.

    Args:
        args ([`~transformers.TrainingArguments`]): The training arguments.
        trim ([`~hf_trim.trainer.arguments.TrimmingConfig`]): What is trimmed, and how.

    Returns:
        `bool`: Not where two trainings shall be the same, bit for bit.
    """
    is_deterministic = args.full_determinism or torch.are_deterministic_algorithms_enabled()
    return TRIAL_STEPS > 0 and trim.trim_backward == "auto" and not is_deterministic


def num_elements(inputs: Any) -> int:
    """
    Args:
        inputs (`Any`): A mini-batch.

    Returns:
        `int`: The number of elements of its tensors.
    """
    if isinstance(inputs, Tensor):
        return inputs.numel()
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (list, tuple)) else ()
    return sum(map(num_elements, parts))


class BackwardTiming:
    """Times the dense and the row-sparse backward pass in turn, and keeps the faster one."""

    def __init__(self):
        self._seconds, self._elements = 0.0, 0  # of this step
        self._is_trial = False
        self._kept: Later | None = None  # the fraction kept in the last step, until it is needed

    @staticmethod
    def _record(state: TrainerState) -> dict[str, Any]:
        """`times` of the trial under way, `mode` and p of the last one, and the fraction kept in the last step."""
        record = kept_state(state, BACKWARD)
        if not record:
            record.update(times=[], mode="", p=1.0, reason=UNTIMED, kept=1.0)
        return record

    def choose(self, state: TrainerState, p: float | None) -> tuple[str, str]:
        """
        The backward pass of this step.

        Args:
            state ([`~transformers.TrainerState`]): The trainer's state.
            p (`float`, *optional*): The fraction to keep; without, it is that of the step before.

        Returns:
            `tuple[str, str]`: `"dense"` or `"sparse"`, and the reason.
        """
        self.save(state)
        record = self._record(state)
        p = record["kept"] if p is None else p
        if p > DENSE_ABOVE:
            self._is_trial = False
            return "sparse", UNTIMED  # which leaves it to the dense one
        mode, last = record["mode"], record["p"]
        may_change = not mode or (p <= 0.75 * last if mode == "dense" else p >= last / 0.75)
        self._is_trial = bool(record["times"]) or may_change
        if not self._is_trial:
            return mode, record["reason"]
        return MODES[len(record["times"]) % 2], UNTIMED

    @contextmanager
    def measure(self, inputs: Any, device: torch.device) -> Iterator[None]:
        """
        Time what runs in this context, if the step is one of a trial.

        Args:
            inputs (`Any`): The mini-batch; times are for each of its elements, since texts vary in length.
            device (`torch.device`): Where it runs; its queue is waited for.
        """
        if not self._is_trial:
            yield
            return
        self._wait(device)
        start = perf_counter()
        yield
        self._wait(device)
        self._seconds += perf_counter() - start
        self._elements += num_elements(inputs)

    @staticmethod
    def _wait(device: torch.device) -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    def save(self, state: TrainerState) -> None:
        """
        Put what was kept in the last step into the trainer's state.

        Args:
            state ([`~transformers.TrainerState`]): The trainer's state.
        """
        if self._kept is not None:
            self._record(state)["kept"], self._kept = float(self._kept.read()), None

    def end_step(self, state: TrainerState, accelerator: Accelerator, p: float, kept: Tensor | None) -> None:
        """
        Note the time of a step, and decide at the end of a trial. All processes call this at the same time.

        Args:
            state ([`~transformers.TrainerState`]): The trainer's state.
            accelerator (`accelerate.Accelerator`): Adds the times of the other processes.
            p (`float`): The fraction to keep.
            kept (`torch.Tensor`, *optional*): The fraction that was kept, where p follows the losses.
        """
        record = self._record(state)
        if kept is not None:
            kept = kept.to(accelerator.device)
            self._kept = Later(accelerator.reduce(kept, "mean") if accelerator.num_processes > 1 else kept)
            if waiting.reads_freely(kept.device):
                self.save(state)
        is_trial, seconds, elements = self._is_trial, self._seconds, self._elements
        self._is_trial, self._seconds, self._elements = False, 0.0, 0
        if not is_trial or not elements:
            return
        times = record["times"]
        times.append([seconds, elements])
        if len(times) < TRIAL_STEPS:
            return
        self.save(state)
        p = p if kept is None else record["kept"]
        per_element = torch.tensor([s / n for s, n in times], device=accelerator.device)
        if accelerator.num_processes > 1:
            per_element = accelerator.reduce(per_element, reduction="mean")
        dense, sparse = (min(per_element[start::2].tolist()) * elements * 1000 for start in (2, 3))
        mode, other = ("sparse", "dense") if sparse < dense else ("dense", "sparse")
        reason = (
            f"it takes {min(dense, sparse):.3g} ms, and the {other} one {max(dense, sparse):.3g} ms at p = {p:.2f}"
        )
        record.update(times=[], mode=mode, p=p, reason=reason)
