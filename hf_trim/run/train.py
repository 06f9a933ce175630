"""`python -m hf_trim.run RECIPE`: train a recipe, or compare it with and without trimming."""

import copy
import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.table import Table
from safetensors import SafetensorError
from transformers import set_seed

from hf_trim.data.device_images import DeviceImages
from hf_trim.data.load import Data, load_data
from hf_trim.environment import hardware
from hf_trim.files import is_write_error, write_json
from hf_trim.hub.model_card import describe, plot_curves, render
from hf_trim.hub.push import PushError, push_folder, save_arguments
from hf_trim.report.__main__ import (
    find_records,
    group,
    plot,
    print_report,
    print_table,
    print_wide,
    table_rows,
    write_report,
)
from hf_trim.run.clock import TrainingClock, samples_per_second, train_seconds
from hf_trim.run.grid import expand, is_grid, leave_launcher
from hf_trim.run.metrics import ERROR, PERPLEXITY, Metric
from hf_trim.run.models import build_model, load_processing_class
from hf_trim.run.recipe import (
    Job,
    RecipeError,
    RecipeParser,
    RunArguments,
    parse,
    read_recipe,
    recipe_names,
    user_errors,
)
from hf_trim.run.records import UNITS, make_record, metric_name, read_record, test_score
from hf_trim.trainer.checkpoints import last_complete_checkpoint
from hf_trim.trainer.trainer import TrimmingTrainer


USAGE = """usage: python -m hf_trim.run RECIPE [--compare] [--seeds N] [--any_field value ...]
       python -m hf_trim.run GRID [--seeds N] [--any_field value ...]
       python -m hf_trim.run --list

RECIPE is a name that --list shows, or the path of a YAML file. Its values are defaults that the
command line overrides: the fields of TrainingArguments, trim_*, and those of model and data
(`python -m hf_trim.run RECIPE --help` explains each)."""


class RecipeTrainer(TrimmingTrainer):
    """
    [`TrimmingTrainer`] with the paper's optimizer and learning rate where a recipe asks for them.

    Args:
        run_args ([`RunArguments`]): `l2_weight_decay`, `lr_milestones` and `lr_gamma` count here.
        kwargs: Arguments of [`TrimmingTrainer`].
    """

    def __init__(self, *, run_args: RunArguments, **kwargs):
        super().__init__(**kwargs)
        self.run_args = run_args

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """`Trainer` would push whenever this is called; a recipe is pushed at its end, whole."""
        super().save_model(output_dir, _internal_call=True)

    def create_optimizer(self, model=None):
        """Adam with an L2 penalty on all parameters: `Trainer` has AdamW only, and spares norms and biases."""
        if self.run_args.l2_weight_decay is None or self.optimizer is not None:
            return super().create_optimizer(model)
        parameters = [p for p in (model or self.model).parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(
            parameters, lr=self.args.learning_rate, weight_decay=self.run_args.l2_weight_decay
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """The learning rate falls by a factor at given epochs."""
        if self.run_args.lr_milestones is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        steps_per_epoch = num_training_steps / self.args.num_train_epochs
        self.lr_scheduler = torch.optim.lr_scheduler.MultiStepLR(
            optimizer or self.optimizer,
            [round(epoch * steps_per_epoch) for epoch in self.run_args.lr_milestones],
            self.run_args.lr_gamma,
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler


# The arms of a comparison, and what they select.
ARMS = {"plain": "none", "trimmed": "hardest", "random": "random"}


def load(job: Job) -> Data:
    """
    Args:
        job ([`Job`]): The recipe.

    Returns:
        [`Data`]: Its data, prepared for its model.
    """
    with user_errors():
        return load_data(job.data, load_processing_class(job.model), job.training.device)


def metric_of(data: Data) -> Metric:
    """
    Args:
        data ([`Data`]): A recipe's data.

    Returns:
        [`Metric`]: What its model is judged by.
    """
    return PERPLEXITY if data.kind == "language" else ERROR


def make_trainer(
    job: Job, data: Data, arm: str, seed: int, output_dir: Path, push_to_hub: bool = False
) -> RecipeTrainer:
    """
    A fresh model and its trainer. The seed decides on weights, data order and dropout, so that the arms of one seed
    differ in nothing but what they keep.

    Args:
        job ([`Job`]): The recipe.
        data ([`Data`]): Its data.
        arm (`str`): `"plain"`, `"trimmed"` or `"random"`.
        seed (`int`): The seed.
        output_dir (`Path`): Folder of the run's checkpoints.
        push_to_hub (`bool`, *optional*, defaults to `False`): Whether checkpoints go to the Hub (`hub_strategy`).

    Returns:
        [`RecipeTrainer`]: The trainer.
    """
    args = copy.copy(job.training)
    args.push_to_hub = push_to_hub
    args.output_dir, args.seed, args.trim_select = str(output_dir), seed, ARMS[arm]
    # In a log file bars are noise, and so is a warning per data loader about memory that can't be pinned.
    args.disable_tqdm = args.disable_tqdm or not sys.stderr.isatty()
    args.dataloader_pin_memory = args.dataloader_pin_memory and torch.accelerator.is_available()
    if isinstance(data.train_dataset, DeviceImages) and args.device.type != "cpu":
        # They are where they are needed, and no other process can reach them there.
        args.dataloader_pin_memory, args.dataloader_num_workers = False, 0
    set_seed(seed)
    with user_errors():
        return RecipeTrainer(
            run_args=job.run,
            model=build_model(job.model, data),
            args=args,
            train_dataset=data.train_dataset,
            eval_dataset=data.test_dataset,
            data_collator=data.data_collator,
            processing_class=data.processing_class,
            callbacks=[TrainingClock()],
            **metric_of(data).arguments,
        )


def save_run(job: Job, trainer: RecipeTrainer, data: Data, metrics: dict) -> None:
    """
    Save a finished training in the recipe's folder: model, arguments, trainer state, plot, page, results.

    Args:
        job ([`Job`]): The recipe.
        trainer ([`RecipeTrainer`]): After training and evaluation.
        data ([`Data`]): Its data.
        metrics (`dict`): All that was measured.
    """
    folder = job.output_dir
    trainer.save_model(str(folder))
    if not trainer.is_world_process_zero():
        return
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    save_arguments(trainer.args, folder)
    facts = describe(
        trainer,
        (job.training.hub_model_id or job.name).split("/")[-1],
        license=job.run.license,
        finetuned_from=job.model.hub_name(),
        dataset=job.data.title(),
        dataset_tags=job.data.hub_name(),
        dataset_args=job.data.dataset_config_name,
    )
    facts.update(
        split="the test split",
        train_seconds=train_seconds(trainer.state.log_history),
        includes_evaluation=False,
        command=job.command,
    )
    plot_curves(facts, folder / "curves.png")
    render(facts, str(folder), folder).save(folder / "README.md")
    write_json(folder / "run.json", facts)
    # Last, and whole or not at all: this file says that the training is finished.
    write_json(folder / "all_results.json", metrics)


def push(job: Job) -> None:
    """
    Upload the folder of a finished recipe, and of its comparison if there was one.

    Args:
        job ([`Job`]): The recipe.

    Raises:
        [`RecipeError`]: If there is nothing to push yet.
        [`PushError`]: If the Hub does not take it.
    """
    path = job.output_dir / "run.json"
    if not (job.output_dir / "all_results.json").is_file() or not path.is_file():
        raise RecipeError(f"{job.output_dir} holds no finished training: run the recipe without --push_only first.")
    print(f"Pushed to {push_folder(job.output_dir, json.loads(path.read_text(encoding='utf-8')), job.training)}")


def check_settings(job: Job) -> None:
    """
    Refuse to go on in a folder whose runs had other settings; note the settings in a new one.

    Args:
        job ([`Job`]): The recipe.

    Raises:
        [`RecipeError`]: If the settings differ.
    """
    path = job.output_dir / "settings.json"
    settings = json.loads(json.dumps(job.settings))
    if not path.is_file():
        write_json(path, settings)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise RecipeError(f"{path} is not valid JSON: delete the folder, or choose another --output_dir.") from None
    changed = [
        f"{name} was {before.get(name, 'not set')!r} and is {settings.get(name, 'not set')!r}"
        for name in sorted(before.keys() | settings.keys())
        if before.get(name) != settings.get(name)
    ]
    if changed:
        raise RecipeError(
            f"{job.output_dir} holds runs with other settings ({'; '.join(changed)}): choose another --output_dir, or "
            "delete the folder."
        )


def train(job: Job) -> None:
    """
    Train a recipe once, evaluate it on the test split and save everything as transformers' examples do. An
    interrupted training goes on from its last checkpoint; a finished one is not repeated.

    Args:
        job ([`Job`]): The recipe.
    """
    results = job.output_dir / "all_results.json"
    if results.is_file():
        print(f"Finished before; choose another --output_dir to train again. {results}:\n{results.read_text()}")
        return
    data = load(job)
    arm = next(arm for arm, select in ARMS.items() if select == job.training.trim_select)
    trainer = make_trainer(job, data, arm, job.training.seed, job.output_dir, job.training.push_to_hub)
    metrics = trainer.train(resume_from_checkpoint=last_complete_checkpoint(job.output_dir)).metrics
    metrics["train_seconds"] = train_seconds(trainer.state.log_history)
    metrics.update(samples_per_second(trainer))
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics, combined=False)
    test_metrics = trainer.evaluate()
    trainer.log_metrics("eval", test_metrics)
    trainer.save_metrics("eval", test_metrics, combined=False)
    save_run(job, trainer, data, {**metrics, **test_metrics})
    metric = metric_of(data)
    print(
        f"Test {metric.name} {test_metrics[f'eval_{metric.name}']:.2f}{UNITS[metric.name]}. Model and results are in "
        f"{job.output_dir}."
    )


def finish_run(job: Job, data: Data, arm: str, seed: int) -> dict:
    """
    Train one run of a comparison, from its last checkpoint if there is one, and write its record.

    Args:
        job ([`Job`]): The recipe.
        data ([`Data`]): Its data.
        arm (`str`): `"plain"`, `"trimmed"` or `"random"`.
        seed (`int`): The seed.

    Returns:
        `dict`: The record.
    """
    folder = job.output_dir / f"{arm}-seed{seed}"
    trainer = make_trainer(job, data, arm, seed, folder)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    metrics = trainer.evaluate()
    record = make_record(job.name, arm, seed, job.settings, metrics, trainer.state.log_history)
    record.update(samples_per_second(trainer))
    if (arm, seed) == ("trimmed", job.training.seed):  # the one that can be used, and pushed
        save_run(job, trainer, data, metrics)
    if trainer.is_world_process_zero():
        write_json(record_path(job, arm, seed), record)
        # The record is what is kept; checkpoints of many runs would fill the disk.
        shutil.rmtree(folder, ignore_errors=True)
    return record


def record_path(job: Job, arm: str, seed: int) -> Path:
    """
    Args:
        job ([`Job`]): The recipe.
        arm (`str`): `"plain"`, `"trimmed"` or `"random"`.
        seed (`int`): The seed.

    Returns:
        `Path`: Where the run's record is written.
    """
    return job.output_dir / "records" / f"{arm}-seed{seed}.json"


def compare(job: Job) -> None:
    """
    Train each arm with each seed, and print and plot what came out. Finished runs are not repeated, an interrupted
    one goes on from its last checkpoint, and one that another process trains is left to it.

    Args:
        job ([`Job`]): The recipe.
    """
    data = None
    seeds = range(job.training.seed, job.training.seed + job.run.seeds)
    runs = [(seed, arm) for seed in seeds for arm in ARMS]
    records = []
    for number, (seed, arm) in enumerate(runs, start=1):
        about, path = f"[{number}/{len(runs)}] {job.name}: {arm}, seed {seed}", record_path(job, arm, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # The processes of one distributed run train it together.
            with FileLock(f"{path}.lock", timeout=0) if job.training.world_size == 1 else nullcontext():
                with user_errors():
                    record = read_record(path)
                if record is None:
                    print(about, flush=True)
                    data = load(job) if data is None else data
                    record = finish_run(job, data, arm, seed)
        except Timeout:
            print(f"{about}: another process trains it", flush=True)
            continue
        metric = metric_name(record)
        print(f"{about}: test {metric} {test_score(record):.2f}{UNITS[metric]}", flush=True)
        records.append(record)
    if not records:
        return
    picture = job.output_dir / "comparison.png"
    plot(records, picture, job.name)
    title = f"{job.name}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}, {hardware()}"
    print_table(title, *table_rows(records))
    print(f"Records: {job.output_dir / 'records'}; plot: {picture}")


def compare_grid(grid: str, options: list[str]) -> None:
    """
    Compare each recipe of a grid, and write one report of all. Nothing is trained before all arguments are checked.

    Args:
        grid (`str`): Name or path of the grid.
        options (`list[str]`): The command line's changes to all of its recipes.
    """
    folder, comparisons = expand(grid, options)
    jobs = [parse(recipe, recipe_options) for recipe, recipe_options in comparisons]
    for job in jobs:
        if job.training.push_to_hub or job.run.push_only:
            raise RecipeError(
                "a grid is not pushed: leave push_to_hub and push_only out, and push one of its comparisons with "
                f"`python -m hf_trim.run {job.name} ... --compare --output_dir {job.output_dir} --push_only`."
            )
        check_settings(job)
    for number, job in enumerate(jobs, start=1):
        print(f"{number} of {len(jobs)}: {job.output_dir}", flush=True)
        compare(job)
    groups = group(find_records([folder]))
    print_report(groups)
    write_report(groups, Path(folder) / "report")
    print(f"Report: {Path(folder) / 'report'}")


def run(job: Job) -> None:
    """
    Train or compare, and push if that was asked for.

    Args:
        job ([`Job`]): The recipe.

    Raises:
        [`PushError`]: If the Hub does not take what was trained.
    """
    check_settings(job)
    if not job.run.push_only:
        (compare if job.run.compare else train)(job)
        if not job.training.push_to_hub:
            return
    if not job.training.should_save:  # another process does
        return
    try:
        push(job)
    except PushError as error:
        raise PushError(f"{error} The same command with --push_only pushes it later.", error.refused) from None


def print_recipes() -> None:
    """Print the recipes that come with the package."""
    table = Table("recipe", "data", "model", "expected time", title="Recipes", title_justify="left")
    for name in recipe_names():
        _, fields = read_recipe(name)
        model = next((fields[key] for key in ("model_name_or_path", "timm_model", "model_type") if key in fields), "?")
        table.add_row(name, fields.get("dataset", "?"), model, fields.get("expected_time", "unknown"))
    for name in recipe_names("grids"):
        _, fields = read_recipe(name)
        table.add_row(name, ", ".join(fields["recipes"]), "a grid: compares each of these recipes")
    print_wide(table)


def main(argv: list[str] | None = None) -> int:
    """
    The command line.

    Args:
        argv (`list[str]`, *optional*): Arguments; the default is `sys.argv[1:]`.

    Returns:
        `int`: Exit status: 0, 2 if the recipe, an argument or the data is wrong, or 1 if the Hub
            took nothing or a file could not be written.
    """
    recipe, *options = (sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        if recipe in ("-h", "--help"):
            print(USAGE)
        elif recipe == "--list":
            print_recipes()
        elif recipe.startswith("-"):
            raise RecipeError(f"the recipe comes first, and {recipe!r} is none.\n{USAGE}")
        elif {"-h", "--help"} & set(options):
            RecipeParser().print_help()
        elif is_grid(recipe):
            leave_launcher()
            compare_grid(recipe, options)
        else:
            run(parse(recipe, options))
    except RecipeError as error:
        print(f"hf_trim.run: {error}", file=sys.stderr)
        return 2
    except PushError as error:
        print(f"hf_trim.run: {error}", file=sys.stderr)
        return 1
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_write_error(error):
            raise
        print(
            f"hf_trim.run: A file could not be written: {str(error).splitlines()[0]}. Make room for it, or choose "
            "another --output_dir. The same command goes on from the last complete checkpoint, and what is finished "
            "stays.",
            file=sys.stderr,
        )
        return 1
    return 0
