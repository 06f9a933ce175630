"""
Part 3: whole trainings of a ResNet-18 and a small vision transformer, plain, with the paper's schedule and adaptive.

Recipes of the project, shortened: on Fashion-MNIST if its files are given, else on scikit-learn's digits.
"""

import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

from hf_trim.data import embedded, sources
from hf_trim.run.commands import run_command
from hf_trim.run.records import read_record


ARMS = ("plain", "trimmed", "adaptive")
# Model → the recipe on Fashion-MNIST, on digits, and what changes.
MODELS: dict[str, tuple[str, str, list[str]]] = {
    "vit": ("fashion-mnist-vit", "digits-vit", []),
    "resnet18": ("fashion-mnist-resnet34", "digits-resnet", ["--timm_model", "resnet18"]),
}
# 400 steps of Fashion-MNIST: a training is as long as its host takes for them.
FASHION = [
    "--max_train_samples", "20000", "--max_test_samples", "5000", "--num_train_epochs", "5",
    "--per_device_train_batch_size", "256", "--warmup_steps", "40",
]  # fmt: skip
DIGITS = ["--num_train_epochs", "15"]
TOY = ["--max_train_samples", "64", "--max_test_samples", "64", "--num_train_epochs", "2", "--image_size", "8"]


def train_case(recipe: str, options: list[str], arm: str, folder: Path, data: str | None) -> dict[str, Any]:
    """
    Train an arm of a recipe.

    Args:
        recipe (`str`): Its name.
        options (`list[str]`): What changes.
        arm (`str`): One of `ARMS`.
        folder (`Path`): Where to.
        data (`str`, *optional*): The folder with the files of Fashion-MNIST.

    Returns:
        `dict[str, Any]`: Test error in percent, seconds of training, the kept share of each epoch.
    """
    arguments = ["--compare", "--arms", arm, "--seeds", "1", "--output_dir", str(folder), *options]
    # Fashion-MNIST is read once for all trainings.
    place = embedded.FASHION_MNIST_FOLDER if data is None else Path(data)
    with mock.patch.object(embedded, "FASHION_MNIST_FOLDER", place):
        with mock.patch.dict(sources.LOADERS, {"fashion-mnist": read_fashion_mnist}):
            status = run_command(recipe, arguments)
    (path,) = (folder / "records").glob(f"{arm}-seed*.json") if status == 0 else [None]
    if path is None:
        return {"problem": f"the run ended with status {status}: see gpu.log"}
    record = read_record(path)
    kept = [epoch["keep_fraction"] for epoch in record["history"] if "keep_fraction" in epoch]
    return {
        "recipe": recipe,
        "test_error": record["test_error"],
        "train_seconds": record["train_seconds"],
        "kept": kept,
    }


@cache
def read_fashion_mnist() -> Any:
    """The loader of the data set, which encodes 70,000 pictures."""
    return embedded.load_fashion_mnist()


def make_cases(device: str, output: str, data: str | None) -> dict[str, Callable[[], dict[str, Any]]]:
    """
    Args:
        device (`str`): `"cuda"`, or `"cpu"` for toy size.
        output (`str`): The folder of the run.
        data (`str`, *optional*): The folder with the files of Fashion-MNIST.

    Returns:
        `dict[str, Callable]`: Name → what runs the case.
    """
    if device == "cpu":
        common = [*TOY, "--use_cpu"]
    else:
        common = ["--bf16", "--save_strategy", "no", *(DIGITS if data is None else FASHION)]
    cases = {}
    for model, (fashion, digits, changes) in MODELS.items():
        if device == "cpu" and model != "vit":
            continue
        recipe = digits if data is None else fashion
        for arm in ARMS[1:2] if device == "cpu" else ARMS:
            folder = Path(output) / "trainings" / re.sub(r"\W", "-", f"{model}-{recipe}")
            cases[f"{model}, {recipe}, {arm}"] = partial(train_case, recipe, [*changes, *common], arm, folder, data)
    return cases
