"""Seconds of training alone, counted across interruptions, and the speed of the input pipeline."""

import time
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

from hf_trim._compat import find_batch_size


if TYPE_CHECKING:
    from hf_trim.trainer.trainer import TrimmingTrainer


class TrainingClock(TrainerCallback):
    """
    Measures the seconds of training, without evaluation and saving. They are written to the trainer state's
    `log_history` as `train_seconds`, so that a resumed training knows the time before its checkpoint.
    """

    def __init__(self):
        self._started = None

    def _start(self, *_, **__):
        if self._started is None:
            self._started = time.perf_counter()

    def _pause(self, state):
        if self._started is not None:
            seconds, self._started = time.perf_counter() - self._started, None
            state.log_history.append({"train_seconds": seconds, "epoch": state.epoch, "step": state.global_step})

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._start()

    def on_step_begin(self, args, state, control, **kwargs):
        self._start()

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_evaluate or control.should_save:
            self._pause(state)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._pause(state)


def train_seconds(log_history: list[dict]) -> float:
    """
    Sum up the seconds that [`TrainingClock`] measured.

    Args:
        log_history (`list[dict]`): `TrainerState.log_history`.

    Returns:
        `float`: Seconds of training so far.
    """
    return sum(log.get("train_seconds", 0.0) for log in log_history)


def samples_per_second(trainer: "TrimmingTrainer", seconds: float = 0.3) -> dict[str, float]:
    """
    Measure how fast a finished training was, and how fast its input pipeline is alone (reading, augmenting, collating,
    copying to the device). If the two numbers are close, the input slows the training down.

    Args:
        trainer ([`~hf_trim.TrimmingTrainer`]): The trainer, after its training with a [`TrainingClock`].
        seconds (`float`, *optional*, defaults to 0.3): How long to draw mini-batches.

    Returns:
        `dict[str, float]`: `train_samples_per_second` and `input_samples_per_second`, over all processes.
    """
    num_trained = trainer.count_samples()
    loader, num_drawn, start = trainer.get_train_dataloader(), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for batch in loader:
            num_drawn += find_batch_size(batch) * trainer.args.world_size
            if time.perf_counter() - start >= seconds:
                break
    if torch.accelerator.is_available() and not trainer.args.use_cpu:
        torch.accelerator.synchronize()  # the copies to the device are part of the time
    elapsed = time.perf_counter() - start
    return {
        "train_samples_per_second": round(num_trained / train_seconds(trainer.state.log_history), 1),
        "input_samples_per_second": round(num_drawn / elapsed, 1),
    }
