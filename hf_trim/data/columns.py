"""
Which columns hold the images or texts, and the classes.

The columns' types and names, and the arguments → [`Columns`].
"""

import logging
from collections.abc import Container
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, Image, Value

from hf_trim.data.arguments import DataArguments
from hf_trim.data.looks import Look, look_at
from hf_trim.messages import closest


logger = logging.getLogger(__name__)

# Usual names on the Hub, the more telling first.
LABEL_COLUMNS = ("label", "labels", "class", "category", "target")
TEXT_COLUMNS = ("text", "sentence", "content", "document")


class Columns(NamedTuple):
    """
    The columns that are used.

    Args:
        kind (`str`): `"image"` or `"text"`.
        inputs (`str`): The column of the images or texts.
        label (`str` or `None`): The column of the classes; `None` if the task needs none.
    """

    kind: str
    inputs: str
    label: str | None


def find_columns(args: DataArguments, splits: dict[str, Dataset]) -> Columns:
    """
    Find the columns by the arguments, else by their types and names.

    Args:
        args ([`~hf_trim.data.DataArguments`]): The task, and the columns as far as the user names them.
        splits (`dict[str, datasets.Dataset]`): The splits by their use, which must all have these columns.

    Returns:
        [`Columns`]: The columns.

    Raises:
        `ValueError`: If a column is missing, of a wrong type, or one of several that it could be.
    """
    features = splits["train"].features
    image, text, label = (
        _named_column(args, name, features) for name in ("image_column", "text_column", "label_column")
    )
    if image and text:
        raise ValueError(f"image_column '{image}' and text_column '{text}' exclude each other: give one of them.")
    train = splits["train"]
    if label is None and args.task == "classification":
        named = [column for column in LABEL_COLUMNS if column in features][:1]
        classes = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
        label = _only_column(args, "label_column", named or classes, train, {text, image})
    if image is None and text is None:
        images = [column for column, feature in features.items() if _is_image(feature)]
        if images:
            image = _only_column(args, "image_column", images, train)
        else:
            named = [column for column in TEXT_COLUMNS if column in features and column != label][:1]
            strings = [column for column, feature in features.items() if column != label and is_string(feature)]
            text = _only_column(args, "text_column (or image_column)", named or strings, train, {label})
    inputs = image or text
    assert inputs is not None  # one of them was named or found
    columns = Columns("image" if image else "text", inputs, label)
    _check_columns(args, columns, splits)
    return columns


def with_pictures(split: Dataset, column: str) -> Dataset:
    """
    Args:
        split (`datasets.Dataset`): A split.
        column (`str`): Its column of images, which may hold them as bytes or paths.

    Returns:
        `datasets.Dataset`: The same, with images in it.
    """
    return split if isinstance(split.features[column], Image) else split.cast_column(column, Image())


def kind_of(feature: Any) -> str:
    """
    Args:
        feature (`datasets.features.FeatureType`): A column's type.

    Returns:
        `str`: What the column holds, in words.
    """
    if isinstance(feature, Value):
        return {"i": "whole numbers", "u": "whole numbers", "f": "numbers", "b": "true and false"}.get(
            feature.dtype[0], feature.dtype
        )
    return {"ClassLabel": "class labels", "Image": "images"}.get(type(feature).__name__, str(feature))


def is_string(feature: Any) -> bool:
    """
    Args:
        feature (`datasets.features.FeatureType`): A column's type.

    Returns:
        `bool`: Whether the column holds strings.
    """
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


def _is_image(feature: Any) -> bool:
    # Parquet files that were not written by datasets hold images as a struct.
    return isinstance(feature, Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _named_column(args: DataArguments, name: str, features: dict[str, Any]) -> str | None:
    """The column that the user named, if it exists."""
    column = getattr(args, name)
    if column is not None and column not in features:
        raise ValueError(
            f"{name} '{column}' is not a column of dataset '{args.dataset}', which has {', '.join(features)}."
            + closest(column, features)
        )
    return column


def _only_column(
    args: DataArguments, name: str, candidates: list[str], train: Dataset, others: Container[str | None] = ()
) -> str:
    """The column that an argument must mean: the only candidate, or the only one whose values look like it."""
    if len(candidates) == 1:
        return candidates[0]
    looks = look_at(train)
    option, is_label = name.split()[0], name == "label_column"
    alike = {
        column: look
        for column, look in looks.items()
        if column not in others
        and (not candidates or column in candidates)
        and (look.is_like_labels and not look.is_like_texts if is_label else look.is_like_texts)
    }
    if len(alike) == 1:
        (column,) = alike
        why = f"the only column whose values repeat ({alike[column].distinct} different ones)"
        logger.warning(
            "%s is not given, and '%s' is taken: %s.", option, column, why if is_label else "the only column of texts"
        )
        return column
    likely = sorted(alike, key=lambda column: looks[column].distinct) or candidates
    reason = f"several could be it: {', '.join(likely)}" if likely else "none looks like it"
    shown = "\n".join(
        f"  {column}: {_describe(looks.get(column), feature)}" for column, feature in train.features.items()
    )
    raise ValueError(
        f"{name} must be given for dataset '{args.dataset}': {reason}. Add --{option} and its "
        f"name. The columns, each with its first value:\n{shown}"
    )


def _describe(look: Look | None, feature: Any) -> str:
    if look is None:
        return kind_of(feature)
    return f"{look.first} ({look.distinct} different {'value' if look.distinct == 1 else 'values'})"


def _check_columns(args: DataArguments, columns: Columns, splits: dict[str, Dataset]) -> None:
    kind, inputs, label = columns
    features = splits["train"].features
    if label is None and kind == "image":
        raise ValueError(f"task 'causal-lm' needs texts, and dataset '{args.dataset}' holds images.")
    if inputs == label:
        raise ValueError(f"label_column and the column of the inputs are both '{label}': give different ones.")
    if kind == "text" and not is_string(features[inputs]):
        raise ValueError(f"text_column '{inputs}' must hold strings, and holds {kind_of(features[inputs])}.")
    for use, split in splits.items():
        missing = {inputs, label or inputs} - set(split.features)
        if missing:
            raise ValueError(
                f"The {use} split lacks the column {', '.join(sorted(missing))}: it has {', '.join(split.features)}."
            )
