"""What is known of a finished training → the model's page on the Hub."""

import importlib.util
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import Trainer

from hf_trim._compat import TASK_MAPPING, extract_hyperparameters_from_trainer
from hf_trim.environment import hardware, versions
from hf_trim.run.records import UNITS, metric_name, test_score


TEMPLATE = Path(__file__).with_suffix(".md")
PAPER = "[arXiv 2110.13058](https://arxiv.org/abs/2110.13058)"
# How each kind of model is called; the lines are run by a test.
CALLS = {
    "image-classification": 'pipe("image.png")',
    "text-classification": 'pipe("A text of the kind it was trained on.")',
    "text-generation": 'pipe("The", max_new_tokens=20)',
    "token-classification": 'pipe("A text of the kind it was trained on.")',
    "fill-mask": 'pipe(f"A {pipe.tokenizer.mask_token}.")',
}
CURVES = ("epoch", "loss", "full_loss", "eval_loss", "keep_fraction")
SPEEDS = ("runtime", "samples_per_second", "steps_per_second")
SELECTED = {
    "hardest": "only the fraction p with the highest loss counts",
    "random": "only a random fraction p counts (the control of a comparison)",
    "none": "everything counts (plain training, the control of a comparison)",
}


def describe(
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
    Args:
        trainer ([`~hf_trim.TrimmingTrainer`]): After its training.
        model_name (`str`): The title.
        language (`str` or `list[str]`, *optional*): Languages of the model.
        license (`str`, *optional*): Its license.
        tags (`str` or `list[str]`, *optional*): Tags beside ours.
        finetuned_from (`str`, *optional*): The Hub's name of the model it started from; found by itself if that came
            from the Hub.
        tasks (`str` or `list[str]`, *optional*): The Hub's name of its task; found by the model's class.
        dataset_tags (`str` or `list[str]`, *optional*): Hub names of its data sets.
        dataset (`str` or `list[str]`, *optional*): Their names to be read.
        dataset_args (`str` or `list[str]`, *optional*): Their configurations.

    Returns:
        `dict`: All that [`render`] needs, as JSON can hold it.
    """
    model = trainer._inner_model()
    config, is_peft = model.config, hasattr(trainer._unwrapped(), "peft_config")
    name = getattr(config, "_name_or_path", None)
    if finetuned_from is None and name and not Path(name).exists():
        finetuned_from = name
    if tasks is None:
        tasks = [task for task, classes in TASK_MAPPING.items() if _holds(classes, type(model).__name__)]
    is_timm = config.model_type == "timm_wrapper"
    logs = trainer.state.log_history
    evaluations = [log for log in logs if "eval_loss" in log]
    metrics = {key.removeprefix("eval_"): value for key, value in (evaluations or [{}])[-1].items()}
    history = [{name: log[name] for name in CURVES if name in log} for log in logs]
    builder = getattr(trainer.eval_dataset, "builder_name", None)
    if dataset is None and dataset_tags is None and builder not in ("csv", "json", "parquet", "text", "generator"):
        dataset = builder
    trim = trainer.trim
    return {
        "model_name": model_name,
        "model_class": type(model).__name__,
        "architecture": config.architecture if is_timm else None,
        "channels": getattr(config, "num_channels", 3),
        "library": "peft" if is_peft else "timm" if is_timm else "transformers",
        "language": language,
        "license": license,
        "tags": [*_listed(tags), *(["transformers"] if is_timm else [])],
        "base_model": finetuned_from,
        "task": next(iter(_listed(tasks)), None),
        "datasets": _listed(dataset_tags),
        "dataset_names": _listed(dataset) or _listed(dataset_tags),
        "dataset_config": next(iter(_listed(dataset_args)), None),
        "split": "the evaluation data",
        "metrics": {key: value for key, value in metrics.items() if key not in (*SPEEDS, "epoch", "step")},
        "trim": {
            key: getattr(trim, key) for key in ("trim_keep_start", "trim_keep_end", "trim_schedule", "trim_select")
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


def _listed(value) -> list:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _holds(classes: dict, name: str) -> bool:
    return any(name in _listed(value) for value in classes.values())


def render(facts: dict, repo: str, folder: Path | None = None) -> ModelCard:
    """
    Args:
        facts (`dict`): What [`describe`] returned.
        repo (`str`): The repository's name, for the lines that load the model.
        folder (`Path`, *optional*): The run's folder. Plots in it are shown; if it has `records` of a comparison, all
            of them are.

    Returns:
        [`huggingface_hub.ModelCard`]: The page.
    """
    trim, history = facts["trim"], facts["history"]
    of = " and ".join(facts["dataset_names"]) or "data that are not named"
    origin = f"fine-tuned from `{facts['base_model']}`" if facts["base_model"] else "trained from scratch"
    what = facts["architecture"] or facts["model_class"]
    begin, end = trim["trim_keep_start"], trim["trim_keep_end"]
    fractions = [(log["epoch"], round(log["keep_fraction"], 3)) for log in history if "keep_fraction" in log]
    falls = f"p fell from {begin} to {end} by {trim['trim_schedule']}, over {facts['epochs']:g} epochs"
    seconds, evaluated = facts["train_seconds"], "with" if facts["includes_evaluation"] else "without"
    limits = [
        "It was tested on data of the same kind as it was trained on, and on no other.",
        "Training on the hardest samples prefers mislabelled ones: with many wrong labels it is likely to do harm.",
        "Neither it nor any other choice of samples is known to beat a random subset consistently "
        "([arXiv 2312.05021](https://arxiv.org/abs/2312.05021)).",
    ]
    shown = {name: folder is not None and (folder / name).is_file() for name in ("curves.png", "comparison.png")}
    versions_used = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return ModelCard.from_template(
        _metadata(facts),
        template_path=str(TEMPLATE),
        model_name=facts["model_name"],
        introduction=f"A {what}, {origin} on {of} with hf_trim: of each "
        f"mini-batch {SELECTED[trim['trim_select']]} (*mini-batch trimming*, H. Fassold, {PAPER}).",
        metrics={name + UNITS.get(name, ""): f"{value:.4g}" for name, value in _numbers(facts).items()},
        split=facts["split"],
        usage=_usage(facts, repo),
        usage_timm=f'import timm\n\nmodel = timm.create_model("hf-hub:{repo}", pretrained=True).eval()'
        if facts["library"] == "timm"
        else "",
        schedule="" if trim["trim_select"] == "none" else f"{falls}.",
        plot="curves.png" if shown["curves.png"] else "",
        fractions=fractions[:: max(1, len(fractions) // 10)],
        clock="" if seconds is None else f"It took {seconds:.1f} s ({evaluated} evaluation) on {facts['hardware']}.",
        hyperparameters=facts["hyperparameters"],
        comparison_plot="comparison.png" if shown["comparison.png"] else "",
        command=facts["command"],
        reproduction=f"Seed {facts['seed']}; {versions_used}; {facts['hardware']}.",
        limits=limits,
        **_comparison(folder),
    )


def _metadata(facts: dict) -> ModelCardData:
    results, task = [], facts["task"]
    if task and facts["dataset_names"]:
        results = [
            EvalResult(
                task_type=task,
                dataset_type=next(iter(facts["datasets"]), facts["dataset_names"][0]),
                dataset_name=facts["dataset_names"][0],
                dataset_config=facts["dataset_config"],
                metric_type=name,
                metric_value=value,
            )
            for name, value in _numbers(facts).items()
            if name != "error"  # which the Hub does not know; accuracy says the same
        ]
    return ModelCardData(
        language=facts["language"],
        license=facts["license"],
        library_name=facts["library"],
        tags=list(dict.fromkeys([*facts["tags"], "hf-trim", "generated_from_trainer"])),
        base_model=facts["base_model"],
        datasets=facts["datasets"] or None,
        metrics=[name for name in _numbers(facts) if name not in ("loss", "error")] or None,
        pipeline_tag=task,
        model_name=facts["model_name"],
        eval_results=results or None,
    )


def _numbers(facts: dict) -> dict[str, float]:
    return {name: value for name, value in facts["metrics"].items() if isinstance(value, (int, float))}


def _usage(facts: dict, repo: str) -> str:
    if facts["task"] not in CALLS or facts.get("channels", 3) != 3:  # pipelines make images RGB
        return ""
    load = f'pipe = pipeline("{facts["task"]}", model="{repo}")'
    return f"from transformers import pipeline\n\n{load}\n{CALLS[facts['task']]}"


def _comparison(folder: Path | None) -> dict:
    """Table, plain words and every seed of a comparison, if there was one."""
    if folder is None or not list(folder.glob("records/*.json")):
        return {}
    from hf_trim.report.__main__ import ARMS, find_records, markdown_table, summarize, table_rows

    records = find_records([str(folder)])
    metric = metric_name(records[0])
    scores = {(record["seed"], record["arm"]): f"{test_score(record):.2f}" for record in records}
    seeds = sorted({seed for seed, _ in scores})
    rows = [[str(seed), *(scores.get((seed, arm), "–") for arm in ARMS)] for seed in seeds]
    summaries = {summary.arm: summary for summary in summarize(records)}
    return {
        "comparison": markdown_table(*table_rows(records)),
        "seeds": markdown_table(["seed", *ARMS], rows),
        "metric": f"test {metric}{UNITS[metric]}",
        "verdict": _verdict(summaries.get("trimmed"), summaries.get("random")),
    }


def _verdict(trimmed, random) -> str:
    if trimmed is None or trimmed.difference is None:
        return ""
    if trimmed.interval is None:
        return "One seed tells nothing about whether trimming helps."
    low, high = trimmed.interval
    found = (
        f"Trimming lowered the test {trimmed.metric} here"
        if high < 0
        else f"Trimming raised the test {trimmed.metric} here: it did harm"
        if low > 0
        else f"Trimming changed the test {trimmed.metric} by no more than chance may"
    )
    if random is None or random.difference is None:
        return f"{found}."
    better = "less" if trimmed.difference > random.difference else "more"
    return f"{found}. On average it lowered it {better} than a random subset of the same size did."


def plot_curves(facts: dict, path: Path) -> None:
    """
    Plot losses, and p, over the epochs; without matplotlib nothing is done.

    Args:
        facts (`dict`): What [`describe`] returned.
        path (`Path`): The PNG file.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    losses = figure.subplots()
    names = {"loss": "trained with", "full_loss": "whole mini-batches", "eval_loss": "test"}
    for key, label in names.items():
        points = [(log["epoch"], log[key]) for log in facts["history"] if key in log]
        if points:
            losses.plot(*zip(*points, strict=True), label=label)
    steps = [(log["epoch"], log["keep_fraction"]) for log in facts["history"] if "keep_fraction" in log]
    if steps:
        fractions = losses.twinx()
        fractions.plot(*zip(*steps, strict=True), color="black", ls=":", drawstyle="steps-pre")
        fractions.set(ylabel="kept fraction p", ylim=(0, 1.05))
        losses.plot([], [], color="black", ls=":", label="kept fraction p (right)")
    losses.set(xlabel="epoch", ylabel="loss", yscale="log")
    losses.grid(alpha=0.3, which="both")
    losses.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
