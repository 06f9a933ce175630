"""A recipe's data, its model and its trainer."""

import copy
import sys
from pathlib import Path
from typing import Any, cast

import torch
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, set_seed

from hf_trim.data import Data, DeviceImages, load_data
from hf_trim.messages import wrap
from hf_trim.run.checks import rehearse
from hf_trim.run.clock import TrainingClock
from hf_trim.run.metrics import ERROR, PERPLEXITY, Metric
from hf_trim.run.models import build_model, load_processing_class
from hf_trim.run.progress import Progress
from hf_trim.run.recipe import Job, RecipeError, RunArguments, user_errors
from hf_trim.trainer.arguments import TrimmingArguments
from hf_trim.trainer.trainer import TrimmingTrainer


class RecipeTrainer(TrimmingTrainer):
    """
    [`TrimmingTrainer`] with the paper's optimizer and learning rate where a recipe asks for them.

    Args:
        run_args ([`RunArguments`]): `l2_weight_decay`, `lr_milestones` and `lr_gamma` are used here.
        kwargs: Arguments of [`TrimmingTrainer`].
    """

    def __init__(self, *, run_args: RunArguments, **kwargs):
        super().__init__(**kwargs)
        self.run_args = run_args

    def name_evaluations(self, split: str) -> None:
        """
        Call the evaluations during a training what they are; its logs have `eval_` before each metric.

        Args:
            split (`str`): `"test"` or `"validation"`.
        """
        self._notices.eval_name = split

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model without pushing it. `Trainer` pushes on each call; a recipe is pushed once, at its end."""
        super().save_model(output_dir, _internal_call=True)

    def _run_epoch(self, **kwargs):
        """Train an epoch, unless early stopping ended the training: `Trainer` forgets that when it goes on."""
        waiting = [x for x in self.callback_handler.callbacks if isinstance(x, EarlyStoppingCallback)]
        if any(x.early_stopping_patience_counter >= x.early_stopping_patience for x in waiting):
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def create_optimizer(self, model=None):
        """Adam with an L2 penalty on all parameters. `Trainer` has only AdamW, and does not decay norms and biases."""
        if self.run_args.l2_weight_decay is None or self.optimizer is not None:
            return super().create_optimizer(model)
        parameters = [p for p in (model or self.model).parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(
            parameters, lr=self.args.learning_rate, weight_decay=self.run_args.l2_weight_decay
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Multiply the learning rate by a factor after given epochs."""
        if self.run_args.lr_milestones is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        steps_per_epoch = num_training_steps / self.args.num_train_epochs
        self.lr_scheduler = torch.optim.lr_scheduler.MultiStepLR(
            optimizer or self.optimizer,
            [round(epoch * steps_per_epoch) for epoch in self.run_args.lr_milestones],
            self.run_args.lr_gamma,
        )
        self._created_lr_scheduler = True  # else a second call of `train` would go on with this one
        return self.lr_scheduler


def load_job_data(job: Job, shown: set[str] | None = None) -> Data:
    """
    Load the data of a recipe, prepared for its model, and print how many rows and classes they have.

    Args:
        job ([`Job`]): The recipe.
        shown (`set[str]`, *optional*): What was printed before, and need not be again. This is added.

    Returns:
        [`Data`]: The splits.

    Raises:
        [`RecipeError`]: If the data cannot be found or used.
    """
    with user_errors():
        data = load_data(job.data, load_processing_class(job.model), job.training.device)
    shown = set() if shown is None else shown
    if job.training.process_index == 0 and data.summary not in shown:
        print(wrap(data.summary, sys.stdout), flush=True)
    shown.add(data.summary)
    return data


def choose_metric(data: Data) -> Metric:
    """
    Choose the metric of a recipe by its data.

    Args:
        data ([`Data`]): The recipe's data.

    Returns:
        [`Metric`]: Perplexity for a language model, test error for a classifier.
    """
    return PERPLEXITY if data.kind == "language" else ERROR


def make_trainer(
    job: Job,
    data: Data,
    changes: dict[str, Any],
    seed: int,
    output_dir: Path,
    push_to_hub: bool = False,
    title: str | None = None,
) -> RecipeTrainer:
    """
    Make a new model and its trainer. The seed sets the weights, the data order and dropout. Two trainers with one seed
    therefore differ only in the samples that they keep.

    Args:
        job ([`Job`]): The recipe.
        data ([`Data`]): Its data.
        changes (`dict`): Training arguments that differ from the recipe's, those of an arm of a comparison.
        seed (`int`): The seed.
        output_dir (`Path`): Folder of the checkpoints.
        push_to_hub (`bool`, *optional*, defaults to `False`): Whether checkpoints go to the Hub (`hub_strategy`).
        title (`str`, *optional*): What a progress bar calls this run of a comparison. The logs of a single training
            are printed too.

    Returns:
        [`RecipeTrainer`]: The trainer.

    Raises:
        [`RecipeError`]: If the model cannot be built, or cannot be trained with these arguments.
    """
    # A copy, because a comparison makes several trainers of one job.
    args = copy.copy(job.training)
    args.push_to_hub = push_to_hub
    args.output_dir, args.seed = str(output_dir), seed
    args.run_name = args.run_name or job.name
    if args.project == TrimmingArguments.project:  # trackio adds a run to one of the same name in its project
        args.project = job.output_dir.absolute().name
    vars(args).update(changes)
    metric, show_bar, args.disable_tqdm = choose_metric(data), not args.disable_tqdm, True
    # Warnings of data loaders about memory that they cannot pin would fill the log.
    args.dataloader_pin_memory = args.dataloader_pin_memory and torch.accelerator.is_available()
    if isinstance(data.train_dataset, DeviceImages) and args.device.type != "cpu":
        # The images are on the device already, and worker processes cannot read them there.
        args.dataloader_pin_memory, args.dataloader_num_workers = False, 0
    split = "test" if data.validation_dataset is None else "validation"
    progress = Progress(title or job.name, split, metric.name, show_logs=title is None, show_bar=show_bar)
    callbacks: list[TrainerCallback] = [TrainingClock(), progress]
    if job.run.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(job.run.early_stopping_patience))
        args.restore_callback_states_from_checkpoint = True  # a resumed training knows how long it has been waiting
    set_seed(seed)
    if args.trim_unit == "token" and data.kind != "language":
        raise RecipeError(
            "trim_unit='token' needs a loss per token, and a classifier has one per sample: use trim_unit='auto' or "
            "'sample'."
        )
    with user_errors():
        trainer = RecipeTrainer(
            run_args=job.run,
            model=build_model(job.model, data),
            args=args,
            train_dataset=data.train_dataset,
            eval_dataset=data.eval_dataset,
            data_collator=data.data_collator,
            processing_class=data.processing_class,
            callbacks=callbacks,
            **metric.arguments,
        )
        rehearse(trainer)
    trainer.name_evaluations(split)
    trainer.remove_callback(PrinterCallback)  # in its place there is `Progress`
    return trainer


def final_metrics(trainer: RecipeTrainer, data: Data) -> dict[str, float]:
    """
    Test a trained model on the test split. What was computed at the end of the training is not computed again.

    Args:
        trainer ([`RecipeTrainer`]): After training.
        data ([`Data`]): The recipe's data.

    Returns:
        `dict[str, float]`: The metrics, as `eval_error` etc. If there is a validation split, its metrics are
            `validation_error` etc., and the logs have those of the test split as `test_error` etc.
    """
    last = _last_evaluation(trainer)
    if data.validation_dataset is None:
        return last or trainer.evaluate()
    # `predict`, and not `evaluate`: callbacks such as early stopping would take it for a test of the validation split.
    tested = trainer.predict(cast(Any, data.test_dataset), metric_key_prefix="test").metrics or {}
    trainer.log(dict(tested))
    if last:
        validated = {name.replace("eval_", "validation_", 1): value for name, value in last.items()}
    else:
        validated = trainer.predict(cast(Any, data.validation_dataset), metric_key_prefix="validation").metrics or {}
    return {name.replace("test_", "eval_", 1): value for name, value in tested.items()} | validated


def _last_evaluation(trainer: RecipeTrainer) -> dict[str, float]:
    """The evaluation of the model as it is, if the training ended with one."""
    state = trainer.state
    logs = [log for log in state.log_history if "eval_loss" in log and log["step"] == state.global_step]
    # `load_best_model_at_end` may have put the model of an earlier step in its place.
    is_last = not trainer.args.load_best_model_at_end or state.best_global_step in (None, state.global_step)
    return {name: value for name, value in logs[-1].items() if name != "step"} if logs and is_last else {}
