"""A finished training → its summary → the model card on the Hub."""

import importlib.util
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import Trainer

from hf_trim._compat import TASK_MAPPING, extract_hyperparameters_from_trainer, unwrap_peft_model
from hf_trim.environment import hardware, versions
from hf_trim.run.records import UNITS, metric_name, test_score


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
            name in the model's configuration, if that is not a local folder.
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
    if finetuned_from is None and name and not Path(name).exists():
        finetuned_from = name
    if tasks is None:
        mapping: dict[str, Any] = TASK_MAPPING
        tasks = [task for task, classes in mapping.items() if _has_class(classes, type(model).__name__)]
    is_timm = config.model_type == "timm_wrapper"
    logs = trainer.state.log_history
    evaluations = [log for log in logs if "eval_loss" in log]
    metrics = {key.removeprefix("eval_"): value for key, value in (evaluations or [{}])[-1].items()}
    history = [{name: log[name] for name in CURVE_FIELDS if name in log} for log in logs]
    builder = getattr(trainer.eval_dataset, "builder_name", None)
    if dataset is None and dataset_tags is None and builder not in ("csv", "json", "parquet", "text", "generator"):
        dataset = builder
    trim = cast(Any, trainer).trim  # the mixin's; its module imports this one
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
        "task": next(iter(_as_list(tasks)), None),
        "datasets": _as_list(dataset_tags),
        "dataset_names": _as_list(dataset) or _as_list(dataset_tags),
        "dataset_config": next(iter(_as_list(dataset_args)), None),
        "split": "the evaluation data",
        "metrics": {key: value for key, value in metrics.items() if key not in (*SPEED_METRICS, "epoch", "step")},
        "trim": {
            key: getattr(trim, key)
            for key in (
                "trim_keep_start",
                "trim_keep_end",
                "trim_schedule",
                "trim_mass",
                "trim_select",
                "trim_skip_hardest",
            )
        },
        "epochs": trainer.state.epoch,
        "history": [log for log in history if len(log) > 1],
        "hyperparameters": {key: str(value) for key, value in extract_hyperparameters_from_trainer(trainer).items()},
        "train_seconds": next((log["train_runtime"] for log in reversed(logs) if "train_runtime" in log), None),
        "includes_evaluation": True,
        "seed": trainer.args.seed,
        "hardware": hardware(),
        "versions": versions(),
        "command": None,
    }


def _as_list(value) -> list:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _has_class(classes: dict, name: str) -> bool:
    """Whether a class is among those of a task; an entry of transformers is one name or several."""
    return any(name in _as_list(value) for value in classes.values())


def render_card(summary: dict, repo: str, folder: Path | None = None) -> ModelCard:
    """
    Fill in the template of the model card.

    Args:
        summary (`dict`): The summary that [`summarize_training`] returned.
        repo (`str`): Name of the repository, for the lines that load the model.
        folder (`Path`, *optional*): The output folder. The card shows its plots, and all its records of a comparison.

    Returns:
        [`huggingface_hub.ModelCard`]: The model card.
    """
    trim, history = summary["trim"], summary["history"]
    data = " and ".join(summary["dataset_names"]) or "data that are not named"
    origin = f"fine-tuned from `{summary['base_model']}`" if summary["base_model"] else "trained from scratch"
    model = summary["architecture"] or summary["model_class"]
    start, end = trim["trim_keep_start"], trim["trim_keep_end"]
    fractions = [(log["epoch"], round(log["keep_fraction"], 3)) for log in history if "keep_fraction" in log]
    schedule = f"p fell from {start} to {end} by {trim['trim_schedule']}, over {summary['epochs']:g} epochs"
    if trim["trim_schedule"] == "adaptive":
        schedule = f"p followed the losses, so that a share of {trim['trim_mass']} of the gradient mass was kept"
    if trim.get("trim_skip_hardest"):
        schedule += f"; the hardest {100 * trim['trim_skip_hardest']:g} % of each mini-batch were left out as suspect"
    seconds, evaluation = summary["train_seconds"], "with" if summary["includes_evaluation"] else "without"
    limits = [
        "It was tested on data of the same kind as it was trained on, and on no other.",
        "Training on the hardest samples prefers mislabelled ones: with many wrong labels it is likely to do harm.",
        "Neither it nor any other choice of samples is known to beat a random subset consistently "
        "([arXiv 2312.05021](https://arxiv.org/abs/2312.05021)).",
    ]
    has_plot = {name: folder is not None and (folder / name).is_file() for name in ("curves.png", "comparison.png")}
    versions_used = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    return ModelCard.from_template(
        _metadata(summary),
        template_path=str(TEMPLATE),
        model_name=summary["model_name"],
        introduction=f"A {model}, {origin} on {data} with hf_trim: of each "
        f"mini-batch {SELECTIONS[trim['trim_select']]} (*mini-batch trimming*, H. Fassold, {PAPER}).",
        metrics={name + UNITS.get(name, ""): f"{value:.4g}" for name, value in _numbers(summary).items()},
        split=summary["split"],
        usage=_usage(summary, repo),
        usage_timm=f'import timm\n\nmodel = timm.create_model("hf-hub:{repo}", pretrained=True).eval()'
        if summary["library"] == "timm"
        else "",
        schedule="" if trim["trim_select"] == "none" else f"{schedule}.",
        plot="curves.png" if has_plot["curves.png"] else "",
        fractions=fractions[:: max(1, len(fractions) // 10)],  # in a table: about ten rows
        clock=""
        if seconds is None
        else f"It took {seconds:.1f} s ({evaluation} evaluation) on {summary['hardware']}.",
        hyperparameters=summary["hyperparameters"],
        comparison_plot="comparison.png" if has_plot["comparison.png"] else "",
        command=summary["command"],
        reproduction=f"Seed {summary['seed']}; {versions_used}; {summary['hardware']}.",
        limits=limits,
        **_comparison(folder),
    )


def _metadata(summary: dict) -> ModelCardData:
    results, task = [], summary["task"]
    if task and summary["dataset_names"]:
        results = [
            EvalResult(
                task_type=task,
                dataset_type=next(iter(summary["datasets"]), summary["dataset_names"][0]),
                dataset_name=summary["dataset_names"][0],
                dataset_config=summary["dataset_config"],
                metric_type=name,
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
        metrics=[name for name in _numbers(summary) if name not in ("loss", "error")] or None,
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


def _comparison(folder: Path | None) -> dict:
    """The part of a model card about a comparison: table, verdict and all seeds. Empty if there was none."""
    if folder is None or not list(folder.glob("records/*.json")):
        return {}
    # Only here: the report needs matplotlib and rich, and a trainer without a comparison does not.
    from hf_trim.report import ARMS, find_records, markdown_table, summarize, table_rows

    records = find_records([str(folder)])
    metric = metric_name(records[0])
    scores = {(record["seed"], record["arm"]): f"{test_score(record):.2f}" for record in records}
    seeds = sorted({seed for seed, _ in scores})
    arms = [arm for arm in ARMS if any(arm == trained for _, trained in scores)]
    rows = [[str(seed), *(scores.get((seed, arm), "–") for arm in arms)] for seed in seeds]
    summaries = {s.arm: s for s in summarize(records)}
    return {
        "comparison": markdown_table(*table_rows(records)),
        "seeds": markdown_table(["seed", *arms], rows),
        "metric": f"test {metric}{UNITS[metric]}",
        "verdict": _verdict(summaries.get("trimmed"), summaries.get("random")),
    }


def _verdict(trimmed, random) -> str:
    """One or two sentences about the interval of the difference between the trimmed and the plain arm."""
    if trimmed is None or trimmed.difference is None:
        return ""
    if trimmed.interval is None:
        return "One seed tells nothing about whether trimming helps."
    low, high = trimmed.interval
    verdict = (
        f"Trimming lowered the test {trimmed.metric} here"
        if high < 0
        else f"Trimming raised the test {trimmed.metric} here: it did harm"
        if low > 0
        else f"Trimming changed the test {trimmed.metric} by no more than chance may"
    )
    if random is None or random.difference is None:
        return f"{verdict}."
    better = "less" if trimmed.difference > random.difference else "more"
    return f"{verdict}. On average it lowered it {better} than a random subset of the same size did."


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

    figure = Figure(figsize=(8, 4), layout="constrained")
    losses = figure.subplots()
    names = {"loss": "trained with", "full_loss": "whole mini-batches", "eval_loss": "test"}
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
    losses.set(xlabel="epoch", ylabel="loss", yscale="log")
    losses.grid(alpha=0.3, which="both")
    losses.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
