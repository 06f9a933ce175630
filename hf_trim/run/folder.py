"""
The output folder of a recipe: to which settings it belongs, and how it is emptied for others.

A folder belongs to settings once a training in it has left something: a failed start blocks nothing.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_trim.files import write_json
from hf_trim.messages import plain
from hf_trim.run.arms import CHANGES
from hf_trim.run.recipe import Job, RecipeError, default_values
from hf_trim.run.records import ARMS


# What a later command goes on from, or does not repeat.
RESULTS = ("all_results.json", "checkpoint-*", "records/*.json", *(f"{arm}-seed*/checkpoint-*" for arm in ARMS))
# All that a run writes, but for logs of trackers.
WRITTEN = (
    "*_results.json", "checkpoint-*", "records", *(f"{arm}-seed*" for arm in ARMS), "settings.json", "run.json",
    "run.log", "trainer_state.json", "training_args.*", "trim_memory.parquet", "hard_samples.html", "data_map.png",
    "curves.png", "comparison.png", "README.md", "config.json", "generation_config.json", "model*.safetensors",
    "model.safetensors.index.json", "preprocessor_config.json", "tokenizer*.json", "special_tokens_map.json",
    "vocab.*", "merges.txt",
)  # fmt: skip
# What the model in a folder has beside the settings; the runs of a comparison differ in it.
MODEL_SETTINGS = ("seed", "trim_select", "arm")


def check_settings(job: Job) -> Job:
    """
    Refuse an output folder whose runs had other settings. A value that is the default is the same as none.

    Args:
        job ([`Job`]): The recipe.

    Returns:
        [`Job`]: The recipe, with its settings as they are written in the folder already.

    Raises:
        [`RecipeError`]: If the settings differ.
    """
    path = job.output_dir / "settings.json"
    if job.run.overwrite or not path.is_file() or not _has_results(job.output_dir):
        return job
    way_out = "or add --overwrite to replace what is there."
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise RecipeError(f"{path} is not valid JSON: choose another --output_dir, {way_out}") from None
    model = {} if job.run.compare else _model_settings(job, arm_of(job.training.trim_select))
    settings = {**_as_json(job.settings), **model}
    defaults = _as_json(default_values())
    changes = {
        name: (saved.get(name, defaults.get(name)), settings.get(name, defaults.get(name)))
        for name in sorted(saved.keys() | settings.keys())
        # A comparison has no model of its own before the first trimmed run ends.
        if name not in MODEL_SETTINGS or (name in saved and name in settings)
    }
    changes = {name: values for name, values in changes.items() if values[0] != values[1]}
    if "trim_select" in changes:
        changes.pop("arm", None)  # which says the same
    is_single = (job.output_dir / "all_results.json").is_file() and not list(job.output_dir.glob("records/*.json"))
    if job.run.compare and is_single:
        raise RecipeError(
            f"{job.output_dir} holds a finished training of its own, whose model a comparison would replace: add "
            f"--output_dir {job.output_dir}_compared to keep both, {way_out}"
        )
    if changes:
        listed = "; ".join(f"{name} was {_shown(old)} and is {_shown(new)}" for name, (old, new) in changes.items())
        difference = "_".join(f"{name}-{plain(new)}" for name, (_, new) in changes.items())
        other = f"{job.output_dir}_{re.sub(r'[^A-Za-z0-9._-]+', '-', difference)[:100]}"
        raise RecipeError(
            f"{job.output_dir} holds runs with other settings ({listed}): add --output_dir {other} to keep both, "
            f"{way_out}"
        )
    return job._replace(settings={name: value for name, value in saved.items() if name not in MODEL_SETTINGS})


def arm_of(trim_select: str) -> str:
    """
    Args:
        trim_select (`str`): What a training keeps.

    Returns:
        `str`: The arm of a comparison that is the same; a recipe's own schedule is that of `"trimmed"`.
    """
    return {"none": "plain", "random": "random"}.get(trim_select, "trimmed")


def claim_folder(job: Job, arm: str | None = None) -> None:
    """
    Write down to which settings the folder belongs, when all is ready for its first training.

    Args:
        job ([`Job`]): The recipe.
        arm (`str`, *optional*): What the model in the folder is, one of `ARMS`, if it is there or will be. It is of
            the recipe's own seed.
    """
    path = job.output_dir / "settings.json"
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and _has_results(job.output_dir) else {}
    model = _model_settings(job, arm) if arm else {name: saved[name] for name in MODEL_SETTINGS if name in saved}
    settings = {**_as_json(job.settings), **model}
    if settings != saved:
        write_json(path, settings)


def clear_folder(folder: Path) -> None:
    """
    Delete what earlier runs wrote. Files that are not theirs stay.

    Args:
        folder (`Path`): The output folder.

    Raises:
        [`RecipeError`]: If another process trains there.
    """
    if not (folder / "settings.json").is_file() and not _has_results(folder):
        return
    if any(is_trained(lock.with_suffix("")) for lock in folder.glob("records/*.lock")):
        raise RecipeError(f"another process trains in {folder}: wait for its end, or choose another --output_dir.")
    for path in [path for pattern in WRITTEN for path in folder.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """
    Make a folder. If this context fails before a file is written, leave no new folder behind.

    Args:
        folder (`Path`): The output folder.

    Raises:
        [`RecipeError`]: If it cannot be made.
    """
    new: list[Path] = []
    try:
        try:
            new = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"output_dir {folder} cannot be made: {error.strerror}. Choose another one.") from None
        yield
    finally:
        if new and all(path.is_dir() for path in folder.rglob("*")):
            shutil.rmtree(folder, ignore_errors=True)
            for path in new[1:]:
                with suppress(OSError):  # one that holds something else stays
                    path.rmdir()


@contextmanager
def lock_run(record: Path, shared: bool) -> Iterator[None]:
    """
    Keep other processes from training the same run.

    Args:
        record (`Path`): The file of its record.
        shared (`bool`): The processes of a distributed run train each run together: no lock.

    Raises:
        `filelock.Timeout`: If another process trains it.
    """
    if shared:
        yield
        return
    path = _lock_of(record)
    record.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path, timeout=0):
        try:
            yield
        finally:
            # While it is held: who had opened it before gets the lock of a deleted file, and finds the record.
            path.unlink(missing_ok=True)


def is_trained(record: Path) -> bool:
    """
    Args:
        record (`Path`): The file of a run's record.

    Returns:
        `bool`: Whether another process trains this run now.
    """
    path = _lock_of(record)
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False  # left by a process that was killed
    except Timeout:
        return True


def _lock_of(record: Path) -> Path:
    return record.with_name(f"{record.name}.lock")


def _shown(value: Any) -> str:
    return plain(value) if isinstance(value, float) else repr(value)


def _has_results(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in RESULTS)


def _model_settings(job: Job, arm: str) -> dict[str, Any]:
    return {"seed": job.training.seed, "trim_select": CHANGES[arm]["trim_select"], "arm": arm}


def _as_json(settings: dict) -> dict[str, Any]:
    """As they look after JSON, so that a tuple equals the list that was read back."""
    return json.loads(json.dumps(settings, default=str))
