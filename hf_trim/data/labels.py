"""
Classes as numbers, and wrong ones for experiments with label noise.

A column of strings, whole numbers, booleans or `ClassLabel` → the column `labels`: a `ClassLabel`, 0 to C − 1.
"""

import re
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value

from hf_trim.data.columns import is_string
from hf_trim.data.splits import TITLES


def encode_labels(column: str, splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """
    Give all splits a column `labels` with class numbers, in the place of the label column.

    Args:
        column (`str`): The column of the classes.
        splits (`dict[str, datasets.Dataset]`): The splits by their use, the training split first; the classes are
            those that occur in it.

    Returns:
        `dict[str, datasets.Dataset]`: The splits; the classes' names are those of `features["labels"]`.

    Raises:
        `ValueError`: If the column does not hold one class per sample, or the splits do not fit each other.
    """
    feature = splits["train"].features[column]
    for use, split in splits.items():
        _check_type(column, feature, split, use)
        if column != "labels" and "labels" in split.features:
            raise ValueError(f"label_column is '{column}', and another column is named 'labels': rename that one.")
    # The classes of a column without names are the values in the training split.
    numbers = {n: n for n in range(feature.num_classes)} if isinstance(feature, ClassLabel) else None
    encoded = {}
    for use, split in splits.items():
        encoded[use], numbers = _encode_split(column, split, TITLES[use], numbers)
    train = encoded["train"]
    if len(set(train["labels"][:])) < 2:
        raise ValueError(
            f"label_column '{column}' has one class only in the {len(train)} rows of the training split: there is "
            "nothing to learn. Choose another column or split."
        )
    return encoded


def add_label_noise(split: Dataset, fraction: float, seed: int) -> Dataset:
    """
    Give some samples another class, each wrong class with the same chance.

    Args:
        split (`datasets.Dataset`): The training split, with `labels`.
        fraction (`float`): The fraction of the samples that get a wrong class.
        seed (`int`): The seed of what is drawn.

    Returns:
        `datasets.Dataset`: The split with wrong labels.
    """
    if not fraction:
        return split
    feature = split.features["labels"]
    generator = np.random.default_rng(seed)
    labels = np.array(split["labels"][:])
    rows = generator.choice(len(labels), round(fraction * len(labels)), replace=False)
    # A shift by 1 to C − 1, modulo C, never gives back the right class.
    labels[rows] = (labels[rows] + generator.integers(1, feature.num_classes, len(rows))) % feature.num_classes
    return split.remove_columns("labels").add_column("labels", labels.tolist(), feature=feature)


def _check_type(column: str, feature: Any, split: Dataset, use: str) -> None:
    is_simple = is_string(feature) or re.fullmatch(r"u?int\d+|bool|float\d+|null", str(getattr(feature, "dtype", "")))
    if not isinstance(feature, ClassLabel) and not (isinstance(feature, Value) and is_simple):
        raise ValueError(
            f"label_column '{column}' must hold one class per sample, as whole numbers or strings, and holds "
            f"{feature}."
        )
    # The same number would mean different classes.
    if isinstance(feature, ClassLabel) and split.features[column] != feature:
        raise ValueError(
            f"label_column '{column}' means {feature} in the training split and {split.features[column]} in the "
            f"{TITLES[use]} split: save both with the same classes."
        )


def _encode_split(
    column: str, split: Dataset, name: str, numbers: dict[Any, int] | None
) -> tuple[Dataset, dict[Any, int]]:
    """One split with the column `labels`, and the number of each class (by default in sorted order)."""
    values = _read_values(column, split, name)
    if numbers is None:
        numbers = {value: number for number, value in enumerate(sorted(set(values)))}
    unknown = sorted(set(values) - set(numbers), key=str)
    if unknown:
        hint = " A label of -1 usually means that the labels are held back." if unknown[0] == -1 else ""
        raise ValueError(
            f"label_column '{column}' has labels in the {name} split that are none of the {len(numbers)} classes: "
            f"{', '.join(str(value) for value in unknown[:5])}.{hint} Choose another split, or drop these rows."
        )
    if isinstance(split.features[column], ClassLabel):
        return split.rename_column(column, "labels") if column != "labels" else split, numbers
    labels = [numbers[value] for value in values]
    feature = ClassLabel(names=[str(value) for value in numbers])
    return split.remove_columns(column).add_column("labels", labels, feature=feature), numbers


def _read_values(column: str, split: Dataset, name: str) -> list:
    """The labels of a split. A CSV file has its whole numbers as floats if one of them is missing."""
    values = split[column][:]
    empty = [
        row
        for row, value in enumerate(values, start=1)
        if value is None or value != value or (isinstance(value, str) and not value.strip())
    ]
    if empty:
        raise ValueError(
            f"Row {empty[0]} has no label: label_column '{column}' is empty in {len(empty)} of {len(values)} rows of "
            f"the {name} split. Give these rows a label, or drop them."
        )
    for row, value in enumerate(values, start=1):
        if isinstance(value, float) and not value.is_integer():
            raise ValueError(
                f"label_column '{column}' must hold one class per sample, as whole numbers or strings, and row {row} "
                f"of the {name} split holds {value}."
            )
    return [int(value) if isinstance(value, float) else value for value in values]
