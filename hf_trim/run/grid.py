"""Grids: a YAML file that names recipes, and settings to vary → the comparisons of all of them."""

import argparse
import itertools
import os
import sys

import torch

from hf_trim.run.recipe import RecipeError, as_options, read_recipe


# What torchrun, and `accelerate launch` through it, tell a process of its group.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
                      "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_")  # fmt: skip


def is_grid(recipe: str) -> bool:
    """
    Args:
        recipe (`str`): Name or path of a recipe or a grid.

    Returns:
        `bool`: Whether it is a grid: a file with a list `recipes`.
    """
    return "recipes" in read_recipe(recipe)[1]


def expand(grid: str, command_line: list[str]) -> tuple[str, list[tuple[str, list[str]]]]:
    """
    Args:
        grid (`str`): Name or path of a grid. `recipes` are its recipes, `vary` (optional) gives some fields several
            values; everything else is set in all of them.
        command_line (`list[str]`): Options for all of them; the output folder holds a folder for each.

    Returns:
        `tuple[str, list[tuple[str, list[str]]]]`: The output folder, and recipe and options of each comparison.

    Raises:
        [`RecipeError`]: If the grid can't be understood.
    """
    name, fields = read_recipe(grid)
    recipes, vary = fields.pop("recipes"), fields.pop("vary", None) or {}
    if not isinstance(recipes, list) or not recipes or not all(isinstance(each, str) for each in recipes):
        raise RecipeError(f"the grid {name}: 'recipes' must be a list of recipes, and is {recipes!r}.")
    if not isinstance(vary, dict) or not all(isinstance(values, list) and values for values in vary.values()):
        raise RecipeError(f"the grid {name}: 'vary' must give each field a list of values, and is {vary!r}.")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", "--output-dir", default=f"runs/{name}")
    folder = parser.parse_known_args(command_line)[0].output_dir
    comparisons = []
    for recipe in recipes:
        for values in itertools.product(*vary.values()):
            chosen = {field: value for field, value in zip(vary, values, strict=True) if value is not None}
            part = "_".join([read_recipe(recipe)[0], *(f"{field}-{value}" for field, value in chosen.items())])
            options = as_options({**fields, **chosen}) + command_line + ["--compare"]
            comparisons.append((recipe, [*options, "--output_dir", f"{folder}/{part}"]))
    return folder, comparisons


def leave_launcher() -> None:
    """
    Under torchrun or `accelerate launch`, start this process over as one of its own, with a GPU of its own: the runs
    of a grid go side by side, each on one device, rather than each over all of them.
    """
    rank = os.environ.get("LOCAL_RANK")
    if rank is None:
        return
    variables = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    if gpus:
        gpus = gpus.split(",")
        variables["CUDA_VISIBLE_DEVICES"] = gpus[int(rank) % len(gpus)]
    sys.stdout.flush()
    os.execve(sys.executable, sys.orig_argv, variables)
