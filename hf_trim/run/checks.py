"""Values of `TrainingArguments` that cannot be meant, and would end a training late or with a traceback."""

from collections.abc import Container
from pathlib import Path
from typing import cast

from transformers import TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_reporting_integration_callbacks

from hf_trim.messages import closest


# Fields → what a value must be, as a test and in words.
NUMBERS = {
    ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"): (
        lambda value: value >= 1,
        "at least 1",
    ),
    ("num_train_epochs",): (lambda value: value > 0, "above 0"),
    ("max_steps",): (lambda value: value > 0 or value == -1, "at least 1, or -1 where num_train_epochs counts"),
    ("learning_rate", "weight_decay", "warmup_steps", "dataloader_num_workers", "seed"): (
        lambda value: value >= 0,
        "at least 0",
    ),
}
LOWER_IS_BETTER = ("loss", "error", "perplexity")
METRICS = {"causal-lm": ("loss", "perplexity", "accuracy")}  # of a task
CLASSIFIER_METRICS = ("loss", "error", "accuracy", "macro_f1")


def check_values(training: TrainingArguments, task: str, given: Container[str]) -> None:
    """
    Check what `TrainingArguments` itself does not, and see to it that the best model is the best.

    Args:
        training (`TrainingArguments`): The arguments of a run. `greater_is_better` is set for the metrics of recipes:
            `TrainingArguments` takes for granted that of all metrics but losses the highest is the best.
        task (`str`): The task of the data.
        given (`Container[str]`): The fields that recipe and command line set.

    Raises:
        `ValueError`: If a value cannot be meant.
    """
    for names, (is_right, need) in NUMBERS.items():
        for name in names:
            value = getattr(training, name)
            if value is not None and not is_right(value):
                raise ValueError(f"{name} must be {need}, and is {value}.")
    if Path(cast(str, training.output_dir)).is_file():
        raise ValueError(f"output_dir must be a folder, and {training.output_dir} is a file: choose another one.")
    _check_trackers(cast(list[str], training.report_to))
    if training.metric_for_best_model is None:
        return
    name, metrics = training.metric_for_best_model.removeprefix("eval_"), METRICS.get(task, CLASSIFIER_METRICS)
    if name not in metrics:
        raise ValueError(
            f"metric_for_best_model must be one of {', '.join(metrics)}, and is '{name}'.{closest(name, metrics)}"
        )
    is_greater_better = name not in LOWER_IS_BETTER
    if "greater_is_better" in given and training.greater_is_better != is_greater_better:
        raise ValueError(
            f"greater_is_better={training.greater_is_better} would take the worst model, since a "
            f"{'higher' if is_greater_better else 'lower'} {name} is better: leave it out."
        )
    training.greater_is_better = is_greater_better


def _check_trackers(names: list[str]) -> None:
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            hint = closest(name, INTEGRATION_TO_CALLBACK)
            raise ValueError(
                f"report_to must name trackers, {', '.join(INTEGRATION_TO_CALLBACK)}, not '{name}'.{hint}"
            )
        try:
            get_reporting_integration_callbacks([name])[0]()
        except (ImportError, RuntimeError, ValueError) as error:  # it is not installed
            raise ValueError(f"report_to '{name}': {error}") from None
