"""
What a training shows: a bar where there is a terminal, and of a single training a line for each log.

For example, "epoch 2 of 5: loss 0.4121, of all items 0.1902, p 0.80, test error 4.17 %".
"""

import sys
from pathlib import Path

from tqdm import tqdm
from transformers import TrainerCallback, TrainerState

from hf_trim.run.records import UNITS


LOSSES = {"loss": "loss", "full_loss": "of all items", "keep_fraction": "p"}


class Progress(TrainerCallback):
    """
    Shows how far a training is.

    Args:
        title (`str`): What is trained, before the bar.
        split (`str`): What is evaluated during the training, `"test"` or `"validation"`.
        metric (`str`): Name of its metric.
        show_logs (`bool`): Whether to print a line for each log.
        show_bar (`bool`): Whether to draw a bar, if there is a terminal.
    """

    def __init__(self, title: str, split: str, metric: str, show_logs: bool, show_bar: bool):
        self.title, self.split, self.metric, self.show_logs = title, split, metric, show_logs
        self.show_bar = show_bar and sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._line: tuple[float, str] | None = None  # epoch and losses, until it is known whether a test follows

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.show_bar:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self.title, leave=False, dynamic_ncols=True
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self.show_logs or not state.is_world_process_zero:
            return
        if "loss" in logs:
            self._print(args)
            parts = [f"{name} {logs[key]:.4g}" for key, name in LOSSES.items() if key in logs]
            self._line = (logs["epoch"], ", ".join(parts))
        elif f"eval_{self.metric}" in logs:
            score = f"{self.split} {self.metric} {logs[f'eval_{self.metric}']:.2f}{UNITS[self.metric]}"
            if self._line is not None and self._line[0] == logs["epoch"]:
                self._line = (logs["epoch"], f"{self._line[1]}, {score}")
            else:
                self._print(args)
                self._line = (logs["epoch"], score)
            self._print(args)

    def on_train_end(self, args, state, control, **kwargs):
        self._print(args)
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print(self, args) -> None:
        if self._line is not None:
            epoch, text = self._line
            tqdm.write(f"epoch {epoch:.4g} of {args.num_train_epochs:g}: {text}", file=sys.stdout)
            sys.stdout.flush()
            self._line = None


def describe_checkpoint(checkpoint: str, num_train_epochs: float) -> str:
    """
    Say from where a training goes on.

    Args:
        checkpoint (`str`): The checkpoint's folder.
        num_train_epochs (`float`): Number of epochs of the whole training.

    Returns:
        `str`: For example, `"resuming from checkpoint-54 (epoch 3 of 5)"`.
    """
    folder = Path(checkpoint)
    epoch = TrainerState.load_from_json(str(folder / "trainer_state.json")).epoch
    return f"resuming from {folder.name} (epoch {epoch or 0:.4g} of {num_train_epochs:g})"


def describe_time(seconds: float) -> str:
    """
    Args:
        seconds (`float`): A time.

    Returns:
        `str`: It in the unit that fits, for example `"3 min"`.
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
