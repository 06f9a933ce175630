"""
The samples to train on and to test on.

All splits of a data set → training split and test split, which share no sample; each, if wished, a random subset.
"""

import math

import numpy as np
from datasets import Dataset, DatasetDict

from hf_trim.data.arguments import DataArguments
from hf_trim.messages import closest


def pick_splits(args: DataArguments, splits: DatasetDict) -> tuple[Dataset, Dataset | None]:
    """
    Args:
        args ([`~hf_trim.data.DataArguments`]): Names of the splits.
        splits (`datasets.DatasetDict`): All splits.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset or None]`: The training split; the test split, if there is one.

    Raises:
        `ValueError`: If a split is missing or empty.
    """
    train = _pick_split(args, "train_split", args.train_split, splits)
    if args.test_split is None and ("test" not in splits or args.train_split == "test"):
        return train, None
    if args.test_split == args.train_split:
        raise ValueError(
            f"test_split must differ from train_split, and both are '{args.train_split}': leave test_split out to "
            "test on a part that is not trained on."
        )
    return train, _pick_split(args, "test_split", args.test_split or "test", splits)


def _pick_split(args: DataArguments, argument: str, split: str, splits: DatasetDict) -> Dataset:
    if split not in splits:
        raise ValueError(
            f"{argument} '{split}' is not in dataset '{args.dataset}', which has {', '.join(splits)}."
            + closest(split, splits)
        )
    if len(splits[split]) == 0:
        raise ValueError(f"The split '{split}' of dataset '{args.dataset}' is empty: choose another {argument}.")
    return splits[split]


def split_by_class(args: DataArguments, split: Dataset) -> tuple[Dataset, Dataset]:
    """
    Take a part of the training split to test on, with the same share of each class.

    Args:
        args ([`~hf_trim.data.DataArguments`]): Size and seed of that part.
        split (`datasets.Dataset`): The training split, with `labels`.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: What is left to train on, and the part to test on.

    Raises:
        `ValueError`: If there are too few samples to have each class on both sides.
    """
    names = split.features["labels"].names
    counts = np.bincount(split["labels"][:], minlength=len(names))
    rare = [name for name, count in zip(names, counts, strict=True) if count == 1]
    num_classes = int((counts > 0).sum())
    num_tests = math.ceil(args.test_fraction * len(split))
    # The conditions of `train_test_split`, checked here to say what to change.
    if rare or not num_classes <= num_tests <= len(split) - num_classes:
        reason = (
            f"the class {rare[0]!r} has one sample"
            if rare
            else f"{num_tests} test samples of {len(split)} (test_fraction {args.test_fraction}) leave no room for "
            f"{num_classes} classes on both sides"
        )
        raise ValueError(f"dataset '{args.dataset}' has no test split, and cannot be split by class: {reason}.")
    parts = split.train_test_split(args.test_fraction, stratify_by_column="labels", seed=args.split_seed)
    return parts["train"], parts["test"]


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
