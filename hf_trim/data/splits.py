"""
The samples to train on, to validate on and to test on.

All splits of a data set → the splits by their use, which share no sample; each, if wished, a random subset.
"""

import math

import numpy as np
from datasets import Dataset, DatasetDict

from hf_trim.data.arguments import DataArguments
from hf_trim.messages import closest


TITLES = {"train": "training", "validation": "validation", "test": "test"}  # use → its name in messages
VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
VALIDATION_FRACTION = 0.1


def pick_splits(args: DataArguments, splits: DatasetDict) -> dict[str, Dataset]:
    """
    Args:
        args ([`~hf_trim.data.DataArguments`]): Names of the splits.
        splits (`datasets.DatasetDict`): All splits.

    Returns:
        `dict[str, datasets.Dataset]`: `train`, and `validation` and `test` as far as there are such splits. What is
            missing is to be held out, see [`hold_out`].

    Raises:
        `ValueError`: If a split is missing or empty, or has two uses.
    """
    names = {"train": args.train_split, "validation": args.validation_split, "test": args.test_split}
    if names["test"] is None and "test" in splits and "test" not in names.values():
        names["test"] = "test"
    if names["validation"] == "auto":
        usual = [name for name in VALIDATION_SPLITS if name in splits and name not in (names["train"], names["test"])]
        names["validation"] = usual[0] if usual and args.validation_fraction is None else None
    picked: dict[str, Dataset] = {}
    for use, name in names.items():
        if name is None:
            continue
        for other in picked:
            if names[other] == name:
                raise ValueError(
                    f"{use}_split must differ from {other}_split, and both are '{name}': leave {use}_split out to "
                    "take a part of train_split that is not trained on."
                )
        picked[use] = _pick_split(args, f"{use}_split", name, splits)
    return picked


def _pick_split(args: DataArguments, argument: str, split: str, splits: DatasetDict) -> Dataset:
    if split not in splits:
        raise ValueError(
            f"{argument} '{split}' is not in dataset '{args.dataset}', which has {', '.join(splits)}."
            + closest(split, splits)
        )
    if len(splits[split]) == 0:
        raise ValueError(f"The split '{split}' of dataset '{args.dataset}' is empty: choose another {argument}.")
    return splits[split]


def fractions_to_hold_out(args: DataArguments, splits: dict[str, Dataset]) -> dict[str, float]:
    """
    Args:
        args ([`~hf_trim.data.DataArguments`]): The sizes of the parts.
        splits (`dict[str, datasets.Dataset]`): What [`pick_splits`] returned.

    Returns:
        `dict[str, float]`: The splits that are missing, and the fraction of the training split that each of them gets.
    """
    fractions = {} if "test" in splits else {"test": args.test_fraction}
    if "validation" not in splits and (args.validation_split or args.validation_fraction):
        fractions["validation"] = args.validation_fraction or VALIDATION_FRACTION
    return fractions


def hold_out(args: DataArguments, splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """
    Take the splits that are missing out of the training split. For a classifier each part has the same share of each
    class.

    Args:
        args ([`~hf_trim.data.DataArguments`]): Sizes and seed of the parts.
        splits (`dict[str, datasets.Dataset]`): What [`pick_splits`] returned, for a classifier with `labels`.

    Returns:
        `dict[str, datasets.Dataset]`: The splits, among them those that were missing.

    Raises:
        `ValueError`: If there are too few samples to have each class on both sides.
    """
    splits = dict(splits)
    size = len(splits["train"])  # of the whole: a fraction means the same, whatever is taken first
    for use, fraction in fractions_to_hold_out(args, splits).items():
        train = splits["train"]
        count = math.ceil(fraction * size)
        stratify = "labels" if args.task == "classification" else None
        if stratify:
            _check_classes(args, train, use, fraction, count)
        parts = train.train_test_split(count, stratify_by_column=stratify, seed=args.split_seed)
        splits["train"], splits[use] = parts["train"], parts["test"]
    return splits


def _check_classes(args: DataArguments, split: Dataset, use: str, fraction: float, count: int) -> None:
    """The conditions of `train_test_split`, checked here to say what to change."""
    names = split.features["labels"].names
    counts = np.bincount(split["labels"][:], minlength=len(names))
    rare = [name for name, number in zip(names, counts, strict=True) if number == 1]
    num_classes = int((counts > 0).sum())
    if rare or not num_classes <= count <= len(split) - num_classes:
        reason = (
            f"the class {rare[0]!r} has one sample, as {len(rare)} of {num_classes} classes. Leave such samples out, "
            "or name the column of the classes with label_column"
            if rare
            else f"{count} {use} samples of {len(split)} ({use}_fraction {fraction}) leave no room for {num_classes} "
            "classes on both sides"
        )
        raise ValueError(f"dataset '{args.dataset}' has no {use} split, and cannot be split by class: {reason}.")


def take_subset(split: Dataset, size: int | None, seed: int) -> Dataset:
    """
    Args:
        split (`datasets.Dataset`): A split.
        size (`int`, *optional*): The number of samples to draw; all of them by default.
        seed (`int`): The seed of what is drawn.

    Returns:
        `datasets.Dataset`: The subset.
    """
    return split if size is None or size >= len(split) else split.shuffle(seed=seed).select(range(size))
