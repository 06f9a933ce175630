"""Comparisons: a recipe with each arm and each seed, and grids of such comparisons."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_trim.data import Data
from hf_trim.environment import hardware
from hf_trim.files import write_json
from hf_trim.report import find_records, group, plot, print_report, print_table, table_rows, write_report
from hf_trim.run.clock import samples_per_second
from hf_trim.run.grid import expand
from hf_trim.run.recipe import Job, RecipeError, parse, user_errors
from hf_trim.run.records import ARMS, UNITS, make_record, metric_name, read_record, test_score
from hf_trim.run.train import check_settings, save_run
from hf_trim.run.trainer import load_job_data, make_trainer, test_metrics
from hf_trim.trainer.arguments import TrimmingConfig
from hf_trim.trainer.checkpoints import last_complete_checkpoint


# The arguments of each arm that differ from the recipe's.
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {"trim_select": "none"},
    "trimmed": {"trim_select": "hardest"},
    "adaptive": {
        "trim_select": "hardest", "trim_schedule": "adaptive", "trim_keep_start": TrimmingConfig.trim_keep_start,
        "trim_keep_end": TrimmingConfig.trim_keep_end,
    },
    "random": {"trim_select": "random"},
}  # fmt: skip
CHANGES["random-adaptive"] = {**CHANGES["adaptive"], "trim_select": "random"}


def arms_of(job: Job) -> list[str]:
    """
    The arms that a comparison trains.

    Args:
        job ([`Job`]): The recipe. If p follows the losses in it anyway, there are no other adaptive arms.

    Returns:
        `list[str]`: Names of arms, plain first.
    """
    return [arm for arm in ARMS if arm in job.run.arms and not ("adaptive" in arm and job.training.is_adaptive)]


def record_path(job: Job, arm: str, seed: int) -> Path:
    """
    Name the file of a run's record.

    Args:
        job ([`Job`]): The recipe.
        arm (`str`): One of `ARMS`.
        seed (`int`): The seed.

    Returns:
        `Path`: The file.
    """
    return job.output_dir / "records" / f"{arm}-seed{seed}.json"


def finish_run(job: Job, data: Data, arm: str, seed: int) -> dict:
    """
    Train one run of a comparison, from its last checkpoint if there is one, and write its record.

    Args:
        job ([`Job`]): The recipe.
        data ([`Data`]): Its data.
        arm (`str`): One of `ARMS`.
        seed (`int`): The seed.

    Returns:
        `dict`: The record.
    """
    folder = job.output_dir / f"{arm}-seed{seed}"
    trainer = make_trainer(job, data, CHANGES[arm], seed, folder)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    metrics = test_metrics(trainer, data)
    record = make_record(job.name, arm, seed, job.settings, metrics, trainer.state.log_history)
    record.update(samples_per_second(trainer))
    if (arm, seed) == ("trimmed", job.training.seed):  # the model of a comparison that is saved, and can be pushed
        save_run(job, trainer, metrics)
    if trainer.is_world_process_zero():
        write_json(record_path(job, arm, seed), record)
        # The record is enough to continue the comparison; the checkpoints of many runs would fill the disk.
        shutil.rmtree(folder, ignore_errors=True)
    return record


def compare(job: Job) -> None:
    """
    Train each arm with each seed, then print and plot the results. Finished runs are not repeated, and an interrupted
    run continues from its last checkpoint. A run that another process is training is skipped.

    Args:
        job ([`Job`]): The recipe.
    """
    data = None
    seeds = range(job.training.seed, job.training.seed + job.run.seeds)
    runs = [(seed, arm) for seed in seeds for arm in arms_of(job)]
    records = []
    for number, (seed, arm) in enumerate(runs, start=1):
        label, path = f"[{number}/{len(runs)}] {job.name}: {arm}, seed {seed}", record_path(job, arm, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # No lock for the processes of one distributed run: they train each run together.
            with FileLock(f"{path}.lock", timeout=0) if job.training.world_size == 1 else nullcontext():
                with user_errors():
                    record = read_record(path)
                if record is None:
                    print(label, flush=True)
                    # Loaded late: a comparison that is finished needs no data.
                    data = load_job_data(job) if data is None else data
                    record = finish_run(job, data, arm, seed)
        except Timeout:
            print(f"{label}: another process trains it", flush=True)
            continue
        metric = metric_name(record)
        print(f"{label}: test {metric} {test_score(record):.2f}{UNITS[metric]}", flush=True)
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
    Compare each recipe of a grid, and write one report of all. All arguments are checked before the first training.

    Args:
        grid (`str`): Name or path of the grid.
        options (`list[str]`): Options of the command line, for all of its recipes.

    Raises:
        [`RecipeError`]: If the grid, a recipe or an option is wrong.
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
