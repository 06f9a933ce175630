"""Trackers (W&B, trackio, MLflow, TensorBoard): each training is one run of theirs, with its final test in it."""

import shutil
import sys
from pathlib import Path

from transformers import TrainerCallback

from hf_trim.data import Data
from hf_trim.run.trainer import RecipeTrainer, final_metrics


class FinalTest(TrainerCallback):
    """
    Tests a model at the end of its training, before the callbacks of trackers end their run.

    Args:
        trainer ([`RecipeTrainer`]): The trainer.
        data ([`Data`]): Its data.
    """

    def __init__(self, trainer: RecipeTrainer, data: Data):
        self.trainer, self.data = trainer, data
        self.metrics: dict[str, float] = {}
        # The first callback: `Trainer.add_callback` would make it the last.
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_end(self, args, state, control, **kwargs):
        self.metrics = final_metrics(self.trainer, self.data)


def end_run() -> None:
    """End the run of W&B, the only tracker that would add the next training of this process to it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


def keep_logs(folder: Path, kept: Path) -> None:
    """
    Move the logs of TensorBoard out of a folder that will be deleted.

    Args:
        folder (`Path`): The output folder of a run of a comparison.
        kept (`Path`): Where they go.
    """
    for logs in sorted(folder.glob("runs/*")):
        kept.mkdir(parents=True, exist_ok=True)
        for file in logs.iterdir():
            shutil.move(file, kept / file.name)
