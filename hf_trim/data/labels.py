"""
Classes as numbers, and wrong ones for experiments with label noise.

A column of strings, whole numbers or `ClassLabel` → the column `labels`: a `ClassLabel`, numbers from 0 to C − 1.
"""

import re
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value

from hf_trim.data.columns import is_string


def encode_labels(column: str, train: Dataset, test: Dataset | None) -> tuple[Dataset, Dataset | None]:
    """
    Give both splits a column `labels` with class numbers, in the place of the label column.

    Args:
        column (`str`): The column of the classes.
        train (`datasets.Dataset`): The training split; the classes are those that occur in it.
        test (`datasets.Dataset`, *optional*): The test split.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset or None]`: Both splits; the classes' names are those of
        `train.features["labels"]`.

    Raises:
        `ValueError`: If the column does not hold one class per sample, or the splits do not fit each other.
    """
    feature = train.features[column]
    _check_type(column, feature, test)
    for split in (train, test):
        if column != "labels" and split is not None and "labels" in split.features:
            raise ValueError(f"label_column is '{column}', and another column is named 'labels': rename that one.")
    # The classes of a column without names are the values in the training split.
    numbers = {n: n for n in range(feature.num_classes)} if isinstance(feature, ClassLabel) else None
    train, numbers = _encode_split(column, train, "training", numbers)
    if test is not None:
        test, _ = _encode_split(column, test, "test", numbers)
    if len(set(train["labels"][:])) < 2:
        raise ValueError(
            f"label_column '{column}' has one class only in the {len(train)} rows of the training split: there is "
            "nothing to learn. Choose another column or split."
        )
    return train, test


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


def _check_type(column: str, feature: Any, test: Dataset | None) -> None:
    if not isinstance(feature, ClassLabel) and not (
        isinstance(feature, Value) and (is_string(feature) or re.fullmatch(r"u?int\d+|bool", feature.dtype))
    ):
        raise ValueError(
            f"label_column '{column}' must hold one class per sample, as whole numbers or strings, and holds "
            f"{feature}."
        )
    # The same number would mean different classes.
    if test is not None and isinstance(feature, ClassLabel) and test.features[column] != feature:
        raise ValueError(
            f"label_column '{column}' means {feature} in the training split and {test.features[column]} in the test "
            "split: save both with the same classes."
        )


def _encode_split(
    column: str, split: Dataset, name: str, numbers: dict[Any, int] | None
) -> tuple[Dataset, dict[Any, int]]:
    """One split with the column `labels`, and the number of each class (by default in sorted order)."""
    values = split[column][:]
    empty = sum(value is None for value in values)
    if empty:
        raise ValueError(f"label_column '{column}' is empty in {empty} of {len(values)} rows of the {name} split.")
    if numbers is None:
        numbers = {value: number for number, value in enumerate(sorted(set(values)))}
    unknown = sorted(set(values) - set(numbers))
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
