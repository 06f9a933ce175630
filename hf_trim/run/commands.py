"""What `python -m hf_trim.run` does: train a recipe, compare it with and without trimming, or only show something."""

from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hf_trim.files import is_write_error
from hf_trim.hub.push import PushError
from hf_trim.messages import print_error
from hf_trim.report import print_table
from hf_trim.run.chatter import quiet_libraries
from hf_trim.run.compare import compare, compare_grid
from hf_trim.run.dry_run import dry_run
from hf_trim.run.folder import check_settings, made_folder
from hf_trim.run.grid import expand, is_grid, leave_launcher
from hf_trim.run.recipe import (
    Job,
    RecipeError,
    fields_to_run,
    group_fields,
    parse,
    read_recipe,
    recipe_names,
)
from hf_trim.run.starter import as_yaml
from hf_trim.run.train import push, train
from hf_trim.trainer.arguments import TrimmingConfig


# Fields of `TrainingArguments` that `--print_config` shows also where they have their defaults.
IMPORTANT = ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "seed")
GOES_ON = "The same command goes on from the last complete checkpoint, and what is finished stays."


def run(job: Job) -> None:
    """
    Train or compare a recipe, then push it if that was asked for.

    Args:
        job ([`Job`]): The recipe.

    Raises:
        [`RecipeError`]: If the output folder holds runs with other settings.
        [`PushError`]: If the upload fails.
    """
    job = check_settings(job)
    if not job.run.push_only:
        with made_folder(job.output_dir):
            (compare if job.run.compare else train)(job)
        if not job.training.push_to_hub:
            return
    if not job.training.should_save:  # one process of a distributed run pushes for all
        return
    try:
        push(job)
    except PushError as error:
        raise PushError(f"{error} The same command with --push_only pushes it later.", error.refused) from None


def run_recipe(recipe: str | None, options: list[str]) -> None:
    """
    Run a recipe, a grid, or what the command line alone describes; or only show it.

    Args:
        recipe (`str`, *optional*): Name or path of a recipe or a grid.
        options (`list[str]`): Options of the command line.

    Raises:
        [`RecipeError`]: If the recipe, an option or the data are wrong.
        [`PushError`]: If the upload fails.
    """
    folder: str | None = None
    runs: list[tuple[str | None, list[str]]] = [(recipe, options)]
    if recipe is not None and is_grid(recipe):
        folder, comparisons = expand(recipe, options)
        runs = [*comparisons]
    jobs = [_parse_one(run, of_grid=folder is not None) for run in runs]
    if any(job.run.print_config for job in jobs):
        print("---\n".join(config_of(job, fields_to_run(*run)) for job, run in zip(jobs, runs, strict=True)), end="")
    elif any(job.run.dry_run for job in jobs):
        dry_run([check_settings(job) for job in jobs])
    elif folder is not None:
        leave_launcher(options)
        compare_grid(folder, jobs)
    else:
        run(jobs[0])


def _parse_one(run: tuple[str | None, list[str]], of_grid: bool) -> Job:
    """The arguments of a recipe; what is wrong in a grid is said with the comparison that has it."""
    try:
        return parse(*run)
    except RecipeError as error:
        if not of_grid:
            raise
        raise RecipeError(f"in the comparison {Path(run[1][-1]).name}: {error}") from error


def config_of(job: Job, fields: dict[str, Any]) -> str:
    """
    Write a recipe with all that the command line changes, and the values of the most important other fields.

    Args:
        job ([`Job`]): The recipe.
        fields (`dict`): The fields that are set.

    Returns:
        `str`: The recipe as YAML, which runs as `job` would.
    """
    unused = ("trim_keep_start", "trim_keep_end") if job.training.is_adaptive else ("trim_mass",)
    shown = [*IMPORTANT, *(x.name for x in dataclass_fields(TrimmingConfig) if x.name not in unused)]
    values = fields | {name: getattr(job.training, name) for name in shown}
    if values.get("output_dir") == f"runs/{job.name}":  # its default: a recipe of another name has another folder
        del values["output_dir"]
    return as_yaml(group_fields(values))


def print_recipes() -> None:
    """Print the recipes that come with the package."""
    rows = []
    for name in recipe_names():
        _, fields = read_recipe(name)
        model = next((fields[key] for key in ("model_name_or_path", "timm_model", "model_type") if key in fields), "?")
        rows.append([name, fields.get("dataset", "?"), model, fields.get("expected_time", "unknown")])
    for name in recipe_names("grids"):
        _, fields = read_recipe(name)
        count = len(expand(name, [])[1])
        rows.append([name, f"a grid of {count} comparisons", "", fields.get("expected_time", "unknown")])
    print_table("Recipes", ["recipe", "data", "model", "expected time"], rows, least=("model", "data"))


def run_command(recipe: str | None, options: list[str]) -> int:
    """
    Do what the command line asks for, and say what is wrong with it.

    Args:
        recipe (`str`, *optional*): Name or path of a recipe or a grid.
        options (`list[str]`): Options of the command line.

    Returns:
        `int`: Exit status: 0; 2 if the recipe, an argument or the data is wrong; 1 if the Hub took nothing or a file
            could not be written; 130 if it was interrupted.
    """
    try:
        if options == ["--list"]:
            print_recipes()
        else:
            with quiet_libraries():
                run_recipe(recipe, options)
    except RecipeError as error:
        print_error(error)
        return 2
    except PushError as error:
        print_error(error)
        return 1
    except KeyboardInterrupt:
        print_error(f"Stopped. {GOES_ON}")
        return 130
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_write_error(error):
            raise
        print_error(
            f"A file could not be written: {str(error).splitlines()[0]}. Make room for it, or choose another "
            f"--output_dir. {GOES_ON}"
        )
        return 1
    return 0
