"""Comparisons: a recipe with each arm and each seed, and grids of such comparisons."""

import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import cast

from filelock import Timeout

from hf_trim.data import Data
from hf_trim.files import write_json
from hf_trim.messages import wrap
from hf_trim.report import find_records, group, notes, plot, print_report, print_table, table_rows, write_report
from hf_trim.run.arms import Arm, arms_of, check_cost, cost_arm, make_arm, needed_arms
from hf_trim.run.clock import samples_per_second
from hf_trim.run.cost import count_passes
from hf_trim.run.folder import check_settings, claim_folder, is_trained, lock_run, made_folder
from hf_trim.run.metrics import describe_classes
from hf_trim.run.progress import describe_time
from hf_trim.run.recipe import Job, RecipeError, user_errors
from hf_trim.run.records import UNITS, make_record, metric_name, read_record, test_score, used_hardware
from hf_trim.run.summary import read_summary
from hf_trim.run.trackers import keep_logs
from hf_trim.run.train import clear, save_run, start, write_card
from hf_trim.run.trainer import load_job_data, make_trainer


# Whose model is saved: the first of these that is trained.
MODEL_ARMS = ("trimmed", "adaptive", "adaptive-skip", "random", "random-adaptive", "plain")


def model_arm(job: Job) -> str:
    """
    The arm whose model of the first seed a comparison saves.

    Args:
        job ([`Job`]): The recipe.

    Returns:
        `str`: `"trimmed"`, the recipe's own, if it is trained now or was before; else the first that is, of
            `MODEL_ARMS`.
    """
    arms = arms_of(job)
    return next(
        arm for arm in MODEL_ARMS if arm in arms or record_path(job, arm, cast(int, job.training.seed)).is_file()
    )


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


def runs_of(job: Job) -> list[tuple[int, str]]:
    """
    List the runs of a comparison.

    Args:
        job ([`Job`]): The recipe.

    Returns:
        `list[tuple[int, str]]`: Seed and arm of each run, in the order in which they are trained.
    """
    seeds = range(job.training.seed, job.training.seed + job.run.seeds)
    return [(seed, arm) for seed in seeds for arm in arms_of(job)]


def check_records(folder: Path, jobs: list[Job]) -> None:
    """
    Refuse files of earlier runs that cannot be used, before hours of training end in front of one.

    Args:
        folder (`Path`): The output folder of the comparison or the grid. All records in it are in its report.
        jobs (`list[Job]`): The comparisons.

    Raises:
        [`RecipeError`]: If a file is damaged, or `short` cannot have the cost that it needs.
    """
    replaced = [job.output_dir / "records" for job in jobs if job.run.overwrite]
    with user_errors():
        for path in sorted(folder.rglob("records/*.json")):
            if path.parent not in replaced:
                _read_run(path)
        for job in [job for job in jobs if not job.run.overwrite]:
            if (job.output_dir / "run.json").is_file():
                read_summary(job.output_dir / "run.json")
            for seed in [seed for seed, arm in runs_of(job) if arm == "short"]:
                records = [_read_run(record_path(job, arm, seed)) for arm in ("short", cost_arm(job))]
                check_cost(job, seed, *records)


def finish_run(job: Job, data: Data, arm: Arm, seed: int, title: str) -> dict:
    """
    Train one run of a comparison, from its last checkpoint if there is one, and write its record.

    Args:
        job ([`Job`]): The recipe.
        data ([`Data`]): Its data.
        arm ([`Arm`]): What is trained.
        seed (`int`): The seed.
        title (`str`): What the terminal calls it.

    Returns:
        `dict`: The record.
    """
    folder, path = job.output_dir / f"{arm.name}-seed{seed}", record_path(job, arm.name, seed)
    if arm.same_as is not None:
        record = {
            **cast(dict, _read_run(record_path(job, arm.same_as, seed))),
            "arm": arm.name,
            "cost_of": arm.cost_of,
        }
        if job.training.process_index == 0:
            write_json(path, record)
        return record
    trainer = make_trainer(arm.job, data, arm.changes, seed, folder, title=title)
    _, metrics = start(job, data, trainer, folder)
    history = trainer.state.log_history
    record = make_record(job.name, arm.name, seed, job.settings, metrics, history, describe_classes(data))
    record.update(count_passes(trainer, data.kind == "language"), **samples_per_second(trainer))
    if arm.cost_of is not None:
        record["cost_of"] = arm.cost_of
    if (arm.name, seed) == (model_arm(job), job.training.seed):  # whose model is saved
        save_run(job, data, trainer, metrics, metrics, arm.name)
        if trainer.is_world_process_zero():
            claim_folder(job, arm.name)
    if trainer.is_world_process_zero():
        write_json(path, record)
        write_card(job.output_dir)  # its table has this run
        keep_logs(folder, job.output_dir / "runs" / cast(str, trainer.args.run_name))
        # The record is enough to continue the comparison; the checkpoints of many runs would fill the disk.
        shutil.rmtree(folder, ignore_errors=True)
    return record


def compare(job: Job, shown: set[str] | None = None) -> None:
    """
    Train each arm with each seed, then print and plot the results. Finished runs are not repeated, and an interrupted
    run continues from its last checkpoint. A run that another process is training is skipped.

    Args:
        job ([`Job`]): The recipe.
        shown (`set[str]`, *optional*): Descriptions of data that need not be printed again.
    """
    check_records(job.output_dir, [job])
    runs = runs_of(job)
    # A comparison that is finished needs no data.
    is_finished = all(record_path(job, arm, seed).is_file() for seed, arm in runs)
    data = _clear(job, *runs[0], shown) if job.run.overwrite else None if is_finished else load_job_data(job, shown)
    trained, is_main = [], job.training.process_index == 0
    for number, (seed, arm) in enumerate(runs, start=1):
        label, path = f"[{number}/{len(runs)}] {arm}, seed {seed}", record_path(job, arm, seed)
        try:
            # The processes of one distributed run train each run together.
            with lock_run(path, shared=job.training.world_size > 1):
                with user_errors():
                    record = _read_run(path)
                note = "finished before"
                # Looked up now: another process may have finished what it was still training a moment ago.
                needed = needed_arms(job, arm)
                missing = [other for other in needed if not record_path(job, other, seed).is_file()]
                if record is None and missing:
                    print(f"{label}: needs {missing[0]}, which another process trains", flush=True)
                    continue
                if record is None:
                    data = load_job_data(job, shown) if data is None else data  # a record was moved away
                    begun = time.perf_counter()
                    with user_errors():
                        cost_record = _read_run(record_path(job, cost_arm(job), seed)) if needed else None
                        made = make_arm(job, arm, seed, data, cost_record)
                    record = finish_run(job, data, made, seed, label)
                    trained.append(time.perf_counter() - begun)
                    note = describe_time(trained[-1])
                    if made.same_as is not None:
                        note = f"the same as {made.same_as}: {made.cost_of} saves no whole step"
                    left = sum(not record_path(job, arm, seed).exists() for seed, arm in runs[number:])
                    if left:
                        note += f"; {describe_time(left * sum(trained) / len(trained))} left"
        except Timeout:
            print(f"{label}: another process trains it", flush=True)
            continue
        if is_main:
            metric = metric_name(record)
            print(f"{label}: test {metric} {test_score(record):.2f}{UNITS[metric]} ({note})", flush=True)
    if is_main:
        _show(job, [record_path(job, arm, seed) for seed, arm in runs])
        print_missing([job], "table")


def print_missing(jobs: list[Job], what: str) -> None:
    """
    Say which runs the results are without, if another process trains some.

    Args:
        jobs (`list[Job]`): The comparisons.
        what (`str`): What has just been shown of them.
    """
    missing: list[str] = []
    is_busy = False
    for job in jobs:
        for seed, arm in runs_of(job):
            path = record_path(job, arm, seed)
            if not path.is_file():
                missing.append(f"{arm}, seed {seed}" + (f", of {job.output_dir.name}" if len(jobs) > 1 else ""))
                is_busy |= is_trained(path)
    if missing:
        # What such a process waits for or trains next is not locked, and none is if it has failed.
        who = "Another process still trains" if is_busy else "Start the same command again: another process left out"
        count = f"{len(missing)} run{'s' if len(missing) > 1 else ''}"
        text = f"{who} {count}: {'; '.join(missing)}: the {what} is without {'them' if len(missing) > 1 else 'it'}."
        print(wrap(text, sys.stdout))


def _clear(job: Job, seed: int, arm: str, shown: set[str] | None) -> Data:
    """Empty the output folder if the first run can be made; returns its data."""
    data = load_job_data(job, shown)
    first = make_arm(job, arm, seed)
    clear(job, make_trainer(first.job, data, first.changes, seed, job.output_dir / f"{arm}-seed{seed}"))
    return data


def _read_run(path: Path) -> dict | None:
    try:
        return read_record(path)
    except ValueError as error:
        raise ValueError(f"{error} To repeat this run, move the file to another place.") from None


def _show(job: Job, paths: list[Path]) -> None:
    """Print the table of these runs; plot all that the folder holds, and write them into its model card."""
    records = [record for path in paths if (record := read_record(path)) is not None]
    if not records:
        return
    picture = job.output_dir / "comparison.png"
    with user_errors():
        plot(find_records([str(job.output_dir)]), picture, job.name)
    write_card(job.output_dir)
    title = f"{job.name}, {job.run.seeds} seed{'s' if job.run.seeds > 1 else ''}, {used_hardware()}"
    print_table(title, *table_rows(records), notes=tuple(notes(records)))
    path, saved = job.output_dir / "run.json", ""
    if path.is_file():
        summary = read_summary(path)
        saved = f"\nThe model there is that of {summary['arm']}, seed {summary['seed']}."
    print(wrap(f"The records and {picture.name} are in {job.output_dir}.{saved}", sys.stdout))


def compare_grid(folder: str, jobs: list[Job]) -> None:
    """
    Compare each recipe of a grid, and write one report of all. All arguments, folders and records that are there
    are checked before the first training.

    Args:
        folder (`str`): The output folder of the grid.
        jobs (`list[Job]`): Its comparisons.

    Raises:
        [`RecipeError`]: If they cannot run as they are.
    """
    for job in jobs:
        if job.training.push_to_hub or job.run.push_only:
            raise RecipeError(
                "a grid is not pushed: leave push_to_hub and push_only out, and push one of its comparisons with "
                f"`python -m hf_trim.run {job.name} ... --compare --output_dir {job.output_dir} --push_only`."
            )
    jobs = [check_settings(job) for job in jobs]
    check_records(Path(folder), jobs)
    shown: set[str] = set()
    with ExitStack() as folders:
        for job in jobs:
            folders.enter_context(made_folder(job.output_dir))
        for number, job in enumerate(jobs, start=1):
            print(f"{number} of {len(jobs)}: {job.output_dir}", flush=True)
            compare(job, shown)
    if any(Path(folder).rglob("records/*.json")):  # none if another process trains the only run
        with user_errors():
            groups = group(find_records([folder]))
        print_report(groups)
        write_report(groups, Path(folder) / "report")
        print(f"Report: {Path(folder) / 'report'}")
    print_missing(jobs, "report")
