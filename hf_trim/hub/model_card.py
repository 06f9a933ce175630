"""A finished training → its summary → the model card on the Hub."""

import importlib.util
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import Trainer

from hf_trim._compat import TASK_MAPPING, extract_hyperparameters_from_trainer, unwrap_peft_model
from hf_trim.environment import hardware, versions
from hf_trim.hub.comparison import describe_comparison
from hf_trim.run.records import UNITS


TEMPLATE = Path(__file__).with_suffix(".md")
PAPER = "[arXiv 2110.13058](https://arxiv.org/abs/2110.13058)"
# An example call for each task. A test runs them.
CALLS = {
    "image-classification": 'pipe("image.png")',
    "text-classification": 'pipe("A text of the kind it was trained on.")',
    "text-generation": 'pipe("The", max_new_tokens=20)',
    "token-classification": 'pipe("A text of the kind it was trained on.")',
    "fill-mask": 'pipe(f"A {pipe.tokenizer.mask_token}.")',
}
CURVE_FIELDS = ("epoch", "loss", "full_loss", "eval_loss", "keep_fraction")
HUB_METRICS = {"macro_f1": "f1"}  # their names on the Hub
METRIC_TITLES = {"macro_f1": "macro-F1"}
SPEED_METRICS = ("runtime", "samples_per_second", "steps_per_second")
SELECTIONS = {
    "hardest": "only the fraction p with the highest loss counts",
    "random": "only a random fraction p counts (the control of a comparison)",
    "none": "everything counts (plain training, the control of a comparison)",
}


def summarize_training(
    trainer: Trainer,
    model_name: str,
    language=None,
    license=None,
    tags=None,
    finetuned_from=None,
    tasks=None,
    dataset_tags=None,
    dataset=None,
    dataset_args=None,
) -> dict:
    """
    Collect what a model card says about a finished training. The arguments have the names of
    `Trainer.create_model_card`.

    Args:
        trainer ([`~hf_trim.TrimmingTrainer`]): The trainer, after its training.
        model_name (`str`): The title of the model card.
        language (`str` or `list[str]`, *optional*): Languages of the model.
        license (`str`, *optional*): License of the model.
        tags (`str` or `list[str]`, *optional*): Further tags.
        finetuned_from (`str`, *optional*): Hub name of the model that the training started from. The default is the
            name in the model's configuration, if that is a name on the Hub and no local folder.
        tasks (`str` or `list[str]`, *optional*): Hub name of the task. The default follows from the model's class.
        dataset_tags (`str` or `list[str]`, *optional*): Hub names of the data sets.
        dataset (`str` or `list[str]`, *optional*): Names of the data sets as a reader knows them.
        dataset_args (`str` or `list[str]`, *optional*): Configurations of the data sets.

    Returns:
        `dict`: The summary that [`render_card`] and [`plot_curves`] take. JSON can hold it.
    """
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    model = unwrap_peft_model(unwrapped)
    config, is_peft = model.config, hasattr(unwrapped, "peft_config")
    name = getattr(config, "_name_or_path", None)
    if finetuned_from is None and name and _is_hub_name(name):
        finetuned_from = name
    if tasks is None:
        mapping: dict[str, Any] = TASK_MAPPING
        tasks = [task for task, classes in mapping.items() if _has_class(classes, type(model).__name__)]
    is_timm = config.model_type == "timm_wrapper"
    logs = trainer.state.log_history
    history = [{name: log[name] for name in CURVE_FIELDS if name in log} for log in logs]
    builder = getattr(trainer.eval_dataset, "builder_name", None)
    if dataset is None and dataset_tags is None and builder not in ("csv", "json", "parquet", "text", "generator"):
        dataset = builder
    from hf_trim.trainer.schedule import schedule_unit  # here: the trainer's module imports this one

    trim = cast(Any, trainer).trim  # the mixin's
    args, state = trainer.args, trainer.state
    unit = "adaptive" if trim.is_adaptive else schedule_unit(trim.trim_schedule, args.num_train_epochs, args.max_steps)
    return {
        "model_name": model_name,
        "model_class": type(model).__name__,
        "architecture": config.architecture if is_timm else None,
        "channels": getattr(config, "num_channels", 3),
        "library": "peft" if is_peft else "timm" if is_timm else "transformers",
        "language": language,
        "license": license,
        "tags": [*_as_list(tags), *(["transformers"] if is_timm else [])],
        "base_model": finetuned_from,
        # Whether a model without such a name was trained before cannot be seen: it may have loaded weights by hand.
        "origin": f"fine-tuned from `{finetuned_from}`"
        if finetuned_from
        else "fine-tuned from a local model"
        if name
        else "",
        "task": next(iter(_as_list(tasks)), None),
        "datasets": _as_list(dataset_tags),
        "dataset_names": _as_list(dataset) or _as_list(dataset_tags),
        "dataset_config": next(iter(_as_list(dataset_args)), None),
        "split": "the evaluation data",
        "metrics": shown_metrics(_last_evaluation(trainer)),
        "majority_error": None,
        "best_step": state.best_global_step if args.load_best_model_at_end else None,
        "trim": {
            key: getattr(trim, key)
            for key in (
                "trim_keep_start",
                "trim_keep_end",
                "trim_schedule",
                "trim_mass",
                "trim_select",
                "trim_skip_hardest",
                "trim_scope",
            )
        },
        "trims": trim.trims or trim.trims_dataset,
        "schedule_unit": unit,
        "planned": state.max_steps if unit == "step" else args.num_train_epochs,
        "done": state.global_step if unit == "step" else state.epoch,
        "history": [log for log in history if len(log) > 1],
        "hyperparameters": {key: str(value) for key, value in extract_hyperparameters_from_trainer(trainer).items()},
        "train_seconds": next((log["train_runtime"] for log in reversed(logs) if "train_runtime" in log), None),
        "includes_evaluation": True,
        "arm": "trimmed",  # of a comparison
        "seed": trainer.args.seed,
        "hardware": hardware(),
        "versions": versions(),
        "command": None,
        "recipe": None,
    }


def shown_metrics(evaluation: dict) -> dict:
    """
    The metrics that a model card shows.

    Args:
        evaluation (`dict`): What `Trainer.evaluate` returned, or a log of it.

    Returns:
        `dict`: The metrics without their prefix, and without speeds.
    """
    metrics = {key.removeprefix("eval_"): value for key, value in evaluation.items() if key.startswith("eval_")}
    return {key: value for key, value in metrics.items() if key not in SPEED_METRICS}


def _last_evaluation(trainer: Trainer) -> dict:
    """The evaluation of the model as it is: the last one after the training, or that of the step that was loaded."""
    logs, state = trainer.state.log_history, trainer.state
    end = max((place for place, log in enumerate(logs) if "train_runtime" in log), default=0)
    evaluations = [log for log in logs if "eval_loss" in log]
    if not any("eval_loss" in log for log in logs[end:]) and trainer.args.load_best_model_at_end:
        evaluations = [log for log in evaluations if log["step"] == state.best_global_step]
    return (evaluations or [{}])[-1]


def _is_hub_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _as_list(value) -> list:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _has_class(classes: dict, name: str) -> bool:
    """Whether a class is among those of a task; an entry of transformers is one name or several."""
    return any(name in _as_list(value) for value in classes.values())


def render_card(summary: dict, repo: str | None, folder: Path | None = None) -> ModelCard:
    """
    Fill in the template of the model card.

    Args:
        summary (`dict`): The summary that [`summarize_training`] returned.
        repo (`str`, *optional*): Name of the repository, for the lines that load the model; by default they load it
            from the folder.
        folder (`Path`, *optional*): The output folder. The card shows its plots, and all its records of a comparison.

    Returns:
        [`huggingface_hub.ModelCard`]: The model card.
    """
    trim, history = summary["trim"], summary["history"]
    data = " and ".join(summary["dataset_names"])
    model = summary["architecture"] or summary["model_class"]
    fractions = [(log["epoch"], round(log["keep_fraction"], 3)) for log in history if "keep_fraction" in log]
    seconds, evaluation = summary["train_seconds"], "with" if summary["includes_evaluation"] else "without"
    source = str(folder) if repo is None else repo
    names = ("curves.png", "comparison.png", "data_map.png", "hard_samples.html", "trim_memory.parquet")
    files = {name: name if folder is not None and (folder / name).is_file() else "" for name in names}
    versions_used = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    return ModelCard.from_template(
        _metadata(summary),
        template_path=str(TEMPLATE),
        model_name=summary["model_name"],
        introduction=f"A {model}, {summary['origin'] or 'trained'}{f' on {data}' if data else ''} with hf_trim: of "
        f"{_scope(summary)} {SELECTIONS[trim['trim_select'] if summary['trims'] else 'none']} (*mini-batch trimming*, "
        f"H. Fassold, {PAPER}).",
        metrics={
            METRIC_TITLES.get(name, name) + UNITS.get(name, ""): f"{value:.4g}"
            for name, value in _numbers(summary).items()
        },
        split=summary["split"],
        remarks=_remarks(summary),
        usage=_usage(summary, source),
        usage_timm="import timm\n\n"
        f'model = timm.create_model("{"local-dir" if repo is None else "hf-hub"}:{source}", pretrained=True).eval()'
        if summary["library"] == "timm"
        else "",
        schedule=_schedule(summary),
        plot=files["curves.png"],
        fractions=fractions[:: max(1, len(fractions) // 10)],  # in a table: about ten rows
        clock=""
        if seconds is None
        else f"It took {seconds:.1f} s ({evaluation} evaluation) on {summary['hardware']}.",
        hyperparameters=summary["hyperparameters"],
        comparison_plot=files["comparison.png"],
        sample_page=files["hard_samples.html"],
        sample_table=files["trim_memory.parquet"],
        data_map=files["data_map.png"],
        command=summary["command"],
        reproduction=f"Seed {summary['seed']}; {versions_used}; {summary['hardware']}.",
        recipe=summary["recipe"],
        limits=_limits(summary),
        **describe_comparison(folder, summary["seed"], summary["arm"]),
    )


def _scope(summary: dict) -> str:
    is_dataset = summary["trims"] and summary["trim"].get("trim_scope") == "dataset"
    return "the training data, by their last losses, in each epoch" if is_dataset else "each mini-batch"


def _schedule(summary: dict) -> str:
    """How p went; empty if nothing was left out."""
    trim, unit, planned, done = summary["trim"], summary["schedule_unit"], summary["planned"], summary["done"]
    if not summary["trims"]:
        return ""
    start, end = trim["trim_keep_start"], trim["trim_keep_end"]
    if unit == "adaptive":
        schedule = f"p followed the losses, so that a share of {trim['trim_mass']} of the gradient mass was kept"
    elif start == end:
        schedule = f"p was {start} throughout"
    elif planned is None:
        schedule = f"p fell from {start} to {end} by {unit}"
    elif done is not None and done < planned:
        schedule = (
            f"p was to fall from {start} to {end} by {unit}, over {planned:g} {unit}s; the training ended after "
        )
        schedule += f"{done:.4g}"
    else:
        schedule = f"p fell from {start} to {end} by {unit}, over {planned:g} {unit}{'' if planned == 1 else 's'}"
    if trim["trim_skip_hardest"]:
        schedule += f"; the hardest {100 * trim['trim_skip_hardest']:g} % of each mini-batch were left out as suspect"
    return f"{schedule}."


def _remarks(summary: dict) -> list[str]:
    """Sentences below the metrics."""
    best, majority, lines = summary["best_step"], summary["majority_error"], []
    if best is not None:
        lines.append(f"It is the model after step {best}, which was the best in the tests during training.")
    if majority is None:
        return lines
    from hf_trim.report.notes import describe_majority  # what needs matplotlib; only a recipe has this error

    lines.append(describe_majority(majority))
    useless = summary["metrics"]["error"] >= majority
    return [*lines, "**The model is no better than that.**"] if useless else lines


def _limits(summary: dict) -> list[str]:
    limits = []
    if _numbers(summary):
        limits.append("It was tested on data of the same kind as it was trained on, and on no other.")
    if summary["trims"] and summary["trim"]["trim_select"] == "hardest":
        limits += [
            "Training on the hardest samples prefers mislabelled ones: with many wrong labels it may do harm.",
            "Neither it nor any other choice of samples is known to beat a random subset consistently "
            "([arXiv 2312.05021](https://arxiv.org/abs/2312.05021)).",
        ]
    return limits


def _metadata(summary: dict) -> ModelCardData:
    results, task = [], summary["task"]
    if task and summary["dataset_names"]:
        results = [
            EvalResult(
                task_type=task,
                dataset_type=next(iter(summary["datasets"]), "unknown"),  # a name on the Hub
                dataset_name=summary["dataset_names"][0],
                dataset_config=summary["dataset_config"],
                metric_type=HUB_METRICS.get(name, name),
                metric_name=METRIC_TITLES.get(name, name),
                metric_value=value,
            )
            for name, value in _numbers(summary).items()
            if name != "error"  # no metric of the Hub; accuracy says the same
        ]
    return ModelCardData(
        language=summary["language"],
        license=summary["license"],
        library_name=summary["library"],
        tags=list(dict.fromkeys([*summary["tags"], "hf-trim", "generated_from_trainer"])),
        base_model=summary["base_model"],
        datasets=summary["datasets"] or None,
        metrics=[HUB_METRICS.get(name, name) for name in _numbers(summary) if name not in ("loss", "error")] or None,
        pipeline_tag=task,
        model_name=summary["model_name"],
        eval_results=results or None,
    )


def _numbers(summary: dict) -> dict[str, float]:
    return {name: value for name, value in summary["metrics"].items() if isinstance(value, (int, float))}


def _usage(summary: dict, repo: str) -> str:
    if summary["task"] not in CALLS or summary.get("channels", 3) != 3:  # pipelines make images RGB
        return ""
    load = f'pipe = pipeline("{summary["task"]}", model="{repo}")'
    return f"from transformers import pipeline\n\n{load}\n{CALLS[summary['task']]}"


def plot_curves(summary: dict, path: Path) -> None:
    """
    Plot the losses and p over the epochs. Do nothing if matplotlib is not installed.

    Args:
        summary (`dict`): The summary that [`summarize_training`] returned.
        path (`Path`): The PNG file.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    from hf_trim.plotting import scale_values

    figure = Figure(figsize=(8, 4), layout="constrained")
    losses = figure.subplots()
    names = {"loss": "trained with", "full_loss": "whole mini-batches", "eval_loss": "evaluation"}
    for key, label in names.items():
        points = [(log["epoch"], log[key]) for log in summary["history"] if key in log]
        if points:
            losses.plot(*zip(*points, strict=True), label=label)
    steps = [(log["epoch"], log["keep_fraction"]) for log in summary["history"] if "keep_fraction" in log]
    if steps:
        fractions = losses.twinx()
        fractions.plot(*zip(*steps, strict=True), color="black", ls=":", drawstyle="steps-pre")
        fractions.set(ylabel="kept fraction p", ylim=(0, 1.05))
        losses.plot([], [], color="black", ls=":", label="kept fraction p (right)")
    scale_values(losses)
    losses.set(xlabel="epoch", ylabel="loss")
    losses.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
