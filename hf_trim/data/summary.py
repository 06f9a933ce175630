"""What a reader should know of the data before a training: how many rows and classes there are, and the first rows."""

import numpy as np
from datasets import ClassLabel, Dataset

from hf_trim.data.columns import Columns, with_pictures
from hf_trim.data.prepared import Data
from hf_trim.messages import shorten


USES = {"train": "to train on", "validation": "to validate on", "test": "to test on"}
SHOWN_CLASSES = 6
SHOWN_CHARACTERS = 60


def summarize(
    dataset: str, splits: dict[str, Dataset], columns: Columns, held_out: list[str], data: Data | None = None
) -> str:
    """
    Describe the data in a few lines.

    Args:
        dataset (`str`): Its name.
        splits (`dict[str, datasets.Dataset]`): The splits by their use.
        columns ([`~hf_trim.data.columns.Columns`]): The columns that are used.
        held_out (`list[str]`): Which of the splits were taken out of the training split.
        data ([`~hf_trim.data.Data`], *optional*): What was made of them.

    Returns:
        `str`: The columns, how many rows (or blocks of tokens) the splits have, the classes and how often each of them
            occurs in the training split.
    """
    is_cut = data is not None and data.kind == "language"
    parts: list[str] = []
    for use, verb in USES.items():
        if use not in splits:
            continue
        size = len(getattr(data, f"{use}_dataset") if data else splits[use])
        unit = "" if parts else f" blocks of {data.max_seq_length} tokens" if data and is_cut else " rows"
        note = " (held out of the training split)" if use in held_out else ""
        parts.append(f"{size:,}{unit} {verb}{note}")
    used = f"'{columns.inputs}'" + (f" and '{columns.label}'" if columns.label else "")
    lines = [f"Data: {dataset}, column{'s' if columns.label else ''} {used}", f"  {', '.join(parts)}"]
    if columns.label and "labels" in splits["train"].features:
        lines.append(f"  {_count_classes(splits['train'])}")
    return "\n".join(lines)


def _count_classes(train: Dataset) -> str:
    names = train.features["labels"].names
    counts = np.bincount(train["labels"][:], minlength=len(names))
    shown = [f"{name} ({count:,})" for name, count in zip(names, counts, strict=True)][:SHOWN_CLASSES]
    more = f", and {len(names) - SHOWN_CLASSES} more" if len(names) > SHOWN_CLASSES else ""
    return f"{len(names)} classes to train on: {', '.join(shown)}{more}"


def first_rows(train: Dataset, columns: Columns, count: int = 3) -> list[tuple[str, str]]:
    """
    Show the first rows, of as many classes as there are.

    Args:
        train (`datasets.Dataset`): The training split.
        columns ([`~hf_trim.data.columns.Columns`]): The columns that are used.
        count (`int`, *optional*, defaults to 3): How many of them.

    Returns:
        `list[tuple[str, str]]`: The start of each text, or size and mode of each image; and its class, if it has one.
    """
    label = train.features.get("labels") if columns.label else None
    head = train.select(_first_of_each_class(train, count) if label is not None else range(min(count, len(train))))
    if columns.kind == "image":
        head = with_pictures(head, columns.inputs)
    rows = []
    for row in head:
        value = row[columns.inputs]
        if columns.kind == "image":
            text = f"{value.width} × {value.height} pixels, {value.mode}"
        else:
            text = shorten(value or "", SHOWN_CHARACTERS)
        rows.append((text, label.int2str(row["labels"]) if isinstance(label, ClassLabel) else ""))
    return rows


def _first_of_each_class(train: Dataset, count: int) -> list[int]:
    """The first rows of the first classes, in their order; then the next rows."""
    firsts = np.unique(np.array(train["labels"][:]), return_index=True)[1]
    rows = sorted(firsts.tolist())[:count]
    return sorted([*rows, *[row for row in range(min(count, len(train))) if row not in rows][: count - len(rows)]])
