"""
What the columns of a data set look like, for proposals where their names tell nothing.

A table → of each simple column its first value, how many different ones it has, and how many words.
"""

from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Value

from hf_trim.messages import shorten


SAMPLE = 10_000  # rows that are looked at, spread over the data
MOST_CLASSES = 100
ROWS_OF_A_CLASS = 10  # at least, on average
WORDS_OF_A_TEXT = 2.5  # at least, on average
SHOWN = 40  # characters of a value


class Look(NamedTuple):
    """
    What is seen of a column.

    Args:
        first (`str`): Its first value.
        distinct (`int`): How many different values there are, of those that were looked at.
        rows (`int`): How many values were looked at.
        words (`float`): Words of a value, on average; 0 if it does not hold strings.
    """

    first: str
    distinct: int
    rows: int
    words: float

    @property
    def is_like_labels(self) -> bool:
        """Whether the values repeat as classes do."""
        return 2 <= self.distinct <= min(MOST_CLASSES, self.rows // ROWS_OF_A_CLASS)

    @property
    def is_like_texts(self) -> bool:
        """Whether the values are more than names."""
        return self.words >= WORDS_OF_A_TEXT


def look_at(split: Dataset) -> dict[str, Look]:
    """
    Look at the columns of a split.

    Args:
        split (`datasets.Dataset`): The split.

    Returns:
        `dict[str, Look]`: Those of strings, numbers and booleans.
    """
    names = [name for name, feature in split.features.items() if isinstance(feature, Value)]
    if not names or not len(split):
        return {}
    rows = np.unique(np.linspace(0, len(split) - 1, min(len(split), SAMPLE)).astype(int))
    table = split.select_columns(names).select(rows)
    return {name: _look(table[name][:]) for name in names}


def _look(values: list[Any]) -> Look:
    given = [value for value in values if value is not None and value == value]
    distinct = set(given)
    is_whole = all(not isinstance(value, float) or value.is_integer() for value in given)
    words = fmean(len(value.split()) for value in given) if given and isinstance(given[0], str) else 0.0
    return Look(
        first=shorten("" if values[0] is None else str(values[0]), SHOWN),
        distinct=len(distinct) if is_whole else len(given),  # measurements are no classes
        rows=len(given),
        words=words,
    )
