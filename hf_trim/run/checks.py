"""
Values of `TrainingArguments` that cannot be meant, and would end a training late or with a traceback.

The fields that are set → [`check_fields`] → `TrainingArguments` → [`check_values`] → the trainer → [`rehearse`].
"""

import json
import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DynamoBackend
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from hf_trim.messages import check_choice, closest
from hf_trim.trainer.arguments import TrimmingArguments


# Fields → what a value must be, as a test and in words.
NUMBERS = {
    ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
     "eval_accumulation_steps", "torch_empty_cache_steps"): (lambda value: value >= 1, "at least 1"),
    ("num_train_epochs",): (lambda value: 0 < value < math.inf, "above 0, and finite"),
    ("logging_steps", "eval_steps", "save_steps"): (
        lambda value: 0 < value < 1 or (value >= 1 and value == int(value)),
        "a whole number from 1, or a fraction of the training",
    ),
    ("max_steps",): (lambda value: value > 0 or value == -1, "at least 1, or -1 where num_train_epochs counts"),
    ("learning_rate", "weight_decay", "warmup_steps", "dataloader_num_workers", "seed", "data_seed", "max_grad_norm",
     "adam_epsilon", "save_total_limit", "eval_delay", "neftune_noise_alpha"): (
        lambda value: 0 <= value < math.inf,
        "at least 0",
    ),
    ("adam_beta1", "adam_beta2"): (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    ("label_smoothing_factor",): (lambda value: 0 <= value <= 1, "between 0 and 1"),
}  # fmt: skip
EXCLUSIVE = (("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval"))
# Fields that hold a mapping; the first three may name a file with it. `--field '{"name": 1}'` gives it as JSON.
FILES = ("accelerator_config", "deepspeed", "fsdp_config")
MAPPINGS = (*FILES, "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "lr_scheduler_kwargs")
# What a recipe sees to itself → why.
NOT_FOR_RECIPES = {
    "label_names": "a recipe finds its labels by label_column",
    "prediction_loss_only": "a recipe is judged by its predictions",
    "batch_eval_metrics": "a recipe's metrics are of the whole test split",
}
STRATEGIES = {"eval_strategy": "no", "save_strategy": "steps"}  # and what they are by default
LOWER_IS_BETTER = ("loss", "error", "perplexity")
METRICS = {"causal-lm": ("loss", "perplexity", "accuracy")}  # of a task
CLASSIFIER_METRICS = ("loss", "error", "accuracy", "macro_f1")


def check_arms(arms: Sequence[str], training: TrimmingArguments, label_noise: float, is_stopped_early: bool) -> None:
    """
    Check that each arm of a comparison is something else than the others.

    Args:
        arms (`Sequence[str]`): The arms that were asked for.
        training ([`TrimmingArguments`]): The recipe's arguments.
        label_noise (`float`): The share of wrong labels.
        is_stopped_early (`bool`): Whether a training may end before its last epoch.

    Raises:
        `ValueError`: If one cannot be trained as it is meant.
    """
    adaptive = [arm for arm in arms if "adaptive" in arm]
    if training.is_adaptive and adaptive:
        raise ValueError(
            f"p follows the losses in this recipe anyway (trim_schedule=adaptive), and the arm {adaptive[0]} would be "
            "the same: ask for trimmed, which is the adaptive one here, and for random, which is its control."
        )
    if "adaptive-skip" in arms and not label_noise:
        raise ValueError(
            "the arm adaptive-skip leaves out as many of the hardest samples as labels are wrong, and no label is: "
            "give label_noise, or leave the arm out."
        )
    if "short" not in arms:
        return
    if "plain" not in arms or not {"adaptive", "trimmed"} & set(arms):
        raise ValueError(
            "the arm short is plain training at the cost of another arm: ask for plain as well, and for adaptive or "
            "trimmed, whose cost it takes."
        )
    if is_stopped_early:
        raise ValueError(
            "the arm short has a cost that is known before, and early_stopping_patience ends trainings when it likes: "
            "leave one of them out."
        )
    if training.max_steps > 0:
        raise ValueError(
            "the arm short has fewer epochs than the others, and max_steps says how long all are trained: give "
            "num_train_epochs in its place."
        )


def check_fields(fields: Mapping[str, Any]) -> None:
    """
    Check what `TrainingArguments` refuses with a message that is hard to read, or lets through.

    Args:
        fields (`dict`): The fields that recipe and command line set, and their values.

    Raises:
        `ValueError`: If a value cannot be meant.
    """
    for names, (is_right, need) in NUMBERS.items():
        for name in names:
            value = fields.get(name)
            if value is not None and not is_right(value):
                raise ValueError(f"{name} must be {need}, and is {value}.")
    for first, second in EXCLUSIVE:
        if fields.get(first) and fields.get(second):
            raise ValueError(f"{first} and {second} exclude each other: leave one of them out.")
    for name, reason in NOT_FOR_RECIPES.items():
        if fields.get(name):
            raise ValueError(f"{name} has no place here, since {reason}: leave it out.")
    for name in MAPPINGS:
        if isinstance(fields.get(name), str):
            _check_mapping(name, fields[name])
    if fields.get("torch_compile_backend") is not None:
        check_choice(
            "torch_compile_backend", fields["torch_compile_backend"], [item.value.lower() for item in DynamoBackend]
        )
    if not fields.get("dataloader_num_workers"):
        for name in ("dataloader_persistent_workers", "dataloader_prefetch_factor"):
            if fields.get(name):
                raise ValueError(f"{name} needs processes that load the data: set dataloader_num_workers.")
    _check_strategies(fields)


def _check_mapping(name: str, value: str) -> None:
    if value.startswith("{"):
        try:
            json.loads(value)
            return
        except ValueError as error:
            raise ValueError(f"{name} is no valid JSON ({error}): write it as '{{\"name\": 1}}'.") from None
    if name not in FILES:
        raise ValueError(f"{name} must be a mapping in JSON, such as '{{\"name\": 1}}', and is {value!r}.")
    if not Path(value).is_file():
        raise ValueError(f"{name} must be a mapping in JSON or a file, and there is no file {value!r}.")


def _check_strategies(fields: Mapping[str, Any]) -> None:
    """Where the best model is taken, each checkpoint needs a test."""
    tests, checkpoints = (str(fields.get(name, default)) for name, default in STRATEGIES.items())
    if checkpoints == "best" and not fields.get("metric_for_best_model") and not fields.get("load_best_model_at_end"):
        raise ValueError(
            "save_strategy='best' needs a metric_for_best_model, such as loss, and tests: set eval_strategy to epoch "
            "or steps."
        )
    for name in ("early_stopping_patience", "load_best_model_at_end", *["save_strategy"] * (checkpoints == "best")):
        if fields.get(name) and (tests == "no" or checkpoints not in (tests, "best")):
            raise ValueError(
                f"{name} needs tests and checkpoints: set eval_strategy and save_strategy to the same, epoch or "
                f"steps. They are '{tests}' and '{checkpoints}'."
            )
    every = fields.get("eval_steps") or fields.get("logging_steps")
    if fields.get("load_best_model_at_end") and tests == checkpoints == "steps" and every and fields.get("save_steps"):
        ratio = fields["save_steps"] / every
        if abs(ratio - round(ratio)) > 1e-6 or ratio < 0.5:
            raise ValueError(
                f"save_steps must be a multiple of eval_steps, so that each checkpoint has a test, and they are "
                f"{fields['save_steps']:g} and {every:g}."
            )


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
    try:
        is_file = Path(cast(str, training.output_dir)).is_file()
    except OSError as error:
        raise ValueError(f"output_dir {training.output_dir} cannot be made: {error.strerror}.") from None
    if is_file:
        raise ValueError(f"output_dir must be a folder, and {training.output_dir} is a file: choose another one.")
    training.report_to = _split_trackers(cast(list[str], training.report_to))
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


def _split_trackers(given: list[str]) -> list[str]:
    """Trackers that can be used; they may be given with commas or spaces between them."""
    names = list(dict.fromkeys(name for item in given for name in re.split(r"[\s,]+", item) if name))
    if "none" in names or "all" in names:
        raise ValueError(f"report_to must be 'none', 'all' or names of trackers, and is {' '.join(names)}.")
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            hint = closest(name, INTEGRATION_TO_CALLBACK)
            raise ValueError(
                f"report_to must name trackers, {', '.join(INTEGRATION_TO_CALLBACK)}, not '{name}'.{hint}"
            )
        if name not in get_available_reporting_integrations():
            raise ValueError(f"report_to '{name}': the package of this tracker is not installed.")
        try:
            get_reporting_integration_callbacks([name])[0]()
        except (ImportError, RuntimeError, ValueError) as error:
            raise ValueError(f"report_to '{name}': {error}") from None
    return names


def rehearse(trainer: Trainer) -> None:
    """
    Make once, of a single number in the place of the model, what a training makes of its arguments first: optimizer,
    schedule, compiled model. What cannot be made would end it with a traceback.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer. It is not changed.

    Raises:
        `ValueError`: If something cannot be made; the message names the fields.
    """
    args: Any = trainer.args
    parameter = torch.nn.Parameter(torch.zeros(1))
    rows = len(cast(Any, trainer.train_dataset))
    if args.dataloader_drop_last and rows < args.train_batch_size:
        raise ValueError(
            f"dataloader_drop_last leaves nothing of {rows} samples, which are no mini-batch of "
            f"{args.train_batch_size}: leave it out, or lower per_device_train_batch_size."
        )
    with _explain(f"optim '{args.optim.value}' cannot be used", "its values are set by optim_args, such as 'name=1'"):
        optimizer_class, options = trainer.get_optimizer_cls_and_kwargs(args, cast(Any, trainer.model))
        if optimizer_class.__module__.startswith("torch."):
            optimizer_class([parameter], **options)
    with _explain(
        f"lr_scheduler_type '{args.lr_scheduler_type.value}' cannot be used",
        "its values are set by lr_scheduler_kwargs, such as '{\"name\": 1}'",
    ):
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([parameter], lr=args.learning_rate),
            num_warmup_steps=args.get_warmup_steps(100),
            num_training_steps=100,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    if args.activation_checkpointing:
        with _explain(
            "activation_checkpointing_kwargs cannot be used", "they are those of torch's checkpoint function"
        ):
            options = {"use_reentrant": False, **(args.activation_checkpointing_kwargs or {})}
            torch.utils.checkpoint.checkpoint(torch.neg, parameter, **options)
    if args.torch_compile_mode is not None:
        with _explain("torch_compile_mode cannot be used", "leave it out"):
            torch.compile(torch.nn.Identity(), mode=args.torch_compile_mode, backend=args.torch_compile_backend)


@contextmanager
def _explain(what: str, advice: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what}: {' '.join(str(error).split()).removesuffix('.')}; {advice}.") from None
