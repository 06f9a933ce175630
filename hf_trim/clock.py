"""Wall-clock time of training alone, kept across interruptions."""

import time

from transformers import TrainerCallback


class TrainingClock(TrainerCallback):
    """
    Writes the seconds spent training, without evaluation and saving, into the trainer state's `log_history` as
    `train_seconds`, so that a checkpoint carries the time of all that led to it.
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
    Args:
        log_history (`list[dict]`): `TrainerState.log_history`.

    Returns:
        `float`: Seconds spent training so far.
    """
    return sum(log.get("train_seconds", 0.0) for log in log_history)
