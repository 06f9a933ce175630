"""A grid: a YAML file with recipes, and settings to vary → one comparison for each combination."""

import argparse
import itertools
import os
import sys
from typing import Any

import torch

from hf_trim.messages import plain
from hf_trim.run.recipe import NOT_SETTINGS, RecipeError, as_options, read_recipe


# Environment variables by which torchrun and `accelerate launch` describe the process group.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
                      "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_")  # fmt: skip


def is_grid(recipe: str) -> bool:
    """
    Tell a grid from a recipe.

    Args:
        recipe (`str`): Name or path of a recipe or a grid.

    Returns:
        `bool`: Whether it is a grid, which has a field `recipes`.

    Raises:
        [`RecipeError`]: If there is no such file, or it is not valid.
    """
    return "recipes" in read_recipe(recipe)[1]


def expand(grid: str, command_line: list[str]) -> tuple[str, list[tuple[str, list[str]]]]:
    """
    List the comparisons of a grid.

    Args:
        grid (`str`): Name or path of a grid. `recipes` lists its recipes: names, or mappings with a name (`recipe`)
            and fields of this one. `vary` (optional, of all or of one) gives a list of values to each field that
            varies. All other fields hold for each comparison; `output_dir` is the folder of all.
        command_line (`list[str]`): Options for each comparison.

    Returns:
        `tuple[str, list[tuple[str, list[str]]]]`: The output folder (one folder in it for each comparison), recipe
            and options of each comparison.

    Raises:
        [`RecipeError`]: If the grid is not valid.
    """
    name, fields = read_recipe(grid)
    entries = [_read_entry(name, entry, fields.get("vary")) for entry in _as_entries(name, fields.pop("recipes"))]
    fields.pop("vary", None)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", "--output-dir", default=fields.pop("output_dir", f"runs/{name}"))
    folder = parser.parse_known_args(command_line)[0].output_dir
    comparisons: dict[str, tuple[str, list[str]]] = {}
    for recipe, own, vary in entries:
        # An entry is told from others of the same recipe by the fields that are not the same in all of them.
        others = [other for same, other, _ in entries if same == recipe]
        telling = {field: own[field] for field in own if any(own[field] != other.get(field) for other in others)}
        for values in itertools.product(*vary.values()):
            chosen = {field: value for field, value in zip(vary, values, strict=True) if value is not None}
            shown = {field: value for field, value in {**telling, **chosen}.items() if field not in NOT_SETTINGS}
            part = "_".join([read_recipe(recipe)[0], *(f"{field}-{plain(value)}" for field, value in shown.items())])
            if part in comparisons:
                raise RecipeError(f"the grid {name} has two comparisons {part}: let them differ in a field.")
            options = as_options({**fields, **own, **chosen}) + command_line + ["--compare"]
            comparisons[part] = (recipe, [*options, "--output_dir", f"{folder}/{part}"])
    return folder, list(comparisons.values())


def _as_entries(grid: str, recipes: Any) -> list[dict]:
    """The list of recipes, each as a mapping."""
    entries = [
        {"recipe": entry} if isinstance(entry, str) else entry
        for entry in (recipes if isinstance(recipes, list) else [])
    ]
    if not entries or not all(isinstance(entry, dict) and isinstance(entry.get("recipe"), str) for entry in entries):
        raise RecipeError(
            f"the grid {grid}: 'recipes' must be a list of recipes, each a name or a mapping with 'recipe', and is "
            f"{recipes!r}."
        )
    return entries


def _read_entry(grid: str, entry: dict, vary: Any) -> tuple[str, dict, dict]:
    """Recipe, its own fields, and those that vary with it."""
    own = {name: value for name, value in entry.items() if name not in ("recipe", "vary")}
    if "output_dir" in own:
        raise RecipeError(
            f"the grid {grid}: each comparison has a folder of its own in that of the grid, and {entry['recipe']} has "
            f"an output_dir, {own['output_dir']}: leave it out, or give the grid one."
        )
    vary = entry.get("vary", vary) or {}
    if not isinstance(vary, dict) or not all(isinstance(values, list) and values for values in vary.values()):
        raise RecipeError(f"the grid {grid}: 'vary' must give each field a list of values, and is {vary!r}.")
    return entry["recipe"], own, vary


def leave_launcher(options: list[str]) -> None:
    """
    Under torchrun or `accelerate launch`, start this process again as an independent one, with one GPU. The processes
    then share the runs of a grid, one run at a time on each GPU, instead of training each run together.

    Args:
        options (`list[str]`): Options of the command line.

    Raises:
        [`RecipeError`]: If each process would delete what another one has just trained.
    """
    rank = os.environ.get("LOCAL_RANK")
    if rank is None:
        return
    if "--overwrite" in options:
        raise RecipeError(
            "--overwrite is for one process, and a launcher starts several: choose another --output_dir, or delete "
            "the old one before."
        )
    variables = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    if gpus:
        names = gpus.split(",")
        variables["CUDA_VISIBLE_DEVICES"] = names[int(rank) % len(names)]
    sys.stdout.flush()
    # Replaces the process, so that the launcher still waits for it, and nothing of the process group stays in memory.
    os.execve(sys.executable, sys.orig_argv, variables)
