"""
Step 1 (batch) of: batch → per-item losses → keep decision → trimmed backward → logs.

Which samples a mini-batch has, by their index in the training data set. The index travels with the samples: from
the data set, which hands out what it was asked for and the indices, around the collator, and out of the data loader
beside the mini-batch. So it is right whatever the sampler, the number of workers and of processes. For example, a
sampler asks for `[7, 2]`: the collator gets rows 7 and 2, as ever, and the loader yields `{BATCH: what it made,
INDICES: [7, 2]}`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader


BATCH, INDICES = "hf_trim_batch", "hf_trim_indices"
LABELS = ("labels", "label", "label_ids")


class Indices:
    """The indices of a mini-batch's samples. What moves batches to a device leaves an object of its own kind alone."""

    def __init__(self, values: list[int]):
        self.values = values


class Fetched(NamedTuple):
    """
    What an [`IndexedDataset`] returns.

    Args:
        items (`list`): What the data set returned.
        indices (`list[int]`): What it was asked for.
    """

    items: list
    indices: list[int]


class IndexedDataset:
    """
    A data set that hands out the indices of its items, too.

    Args:
        dataset (`torch.utils.data.Dataset`): The data set, with a length and items by index.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):  # while a worker unpickles it, there is none
            raise AttributeError(name)
        return getattr(self.dataset, name)  # such as `set_epoch`

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> Fetched:
        """What torch's `DataLoader` calls for a mini-batch."""
        fetch = getattr(self.dataset, "__getitems__", None)
        return Fetched(fetch(indices) if fetch else [self.dataset[index] for index in indices], list(indices))


class IndexedCollator:
    """
    Takes the indices off before the collator, and puts them beside what it made.

    Args:
        collate (`Callable`): The collator, which sees what it would see otherwise.
    """

    def __init__(self, collate: Callable[[list], Any]):
        self.collate = collate

    def __call__(self, fetched: Fetched) -> dict[str, Any]:
        items, indices = fetched
        before = _marks_of_items(items)  # a collator may change its items
        batch = self.collate(items)
        for name, after in _marks_of_batch(batch).items():
            if before.get(name) != after and Counter(before.get(name, ())) == Counter(after):
                raise ValueError(
                    "trim_memory and trim_scope='dataset' need the samples in the order of the collator's input, and "
                    f"{type(self.collate).__name__} changes it ({name} {before[name]} are {after} in the mini-batch): "
                    "let the collator keep the order, or train without these."
                )
        return {BATCH: batch, INDICES: Indices([int(index) for index in indices])}


def _marks_of_items(items: list) -> dict[str, list]:
    """What shows the order of samples: labels that are one number each, and lengths of texts."""
    if not all(isinstance(item, Mapping) for item in items):
        return {}
    marks = {}
    for name in LABELS:
        labels = [_number(item.get(name)) for item in items]
        if None not in labels:
            marks["labels"] = labels
            break
    masks = [item.get("attention_mask") for item in items]
    if all(isinstance(mask, (list, Tensor)) for mask in masks):
        marks["lengths"] = [int(sum(mask)) if isinstance(mask, list) else int(mask.sum()) for mask in masks]
    return marks


def _marks_of_batch(batch: Any) -> dict[str, list]:
    """The same of a mini-batch; of one on a GPU nothing, since the host would wait for it."""
    if not isinstance(batch, Mapping):
        return {}
    marks, labels, mask = {}, batch.get("labels"), batch.get("attention_mask")
    if isinstance(labels, Tensor) and labels.dim() == 1 and labels.device.type == "cpu":
        marks["labels"] = [_number(label) for label in labels.tolist()]
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.device.type == "cpu":
        marks["lengths"] = mask.sum(1).tolist()
    return marks


def _number(value: Any) -> float | None:
    """A number as it is compared: labels of items and of mini-batches may have different data types."""
    if isinstance(value, Tensor):
        value = value.item() if value.dim() == 0 and value.device.type == "cpu" else None
    return None if value is None or isinstance(value, (str, list, tuple, Mapping)) else round(float(value), 4)


def add_indices(loader: DataLoader) -> None:
    """
    Let a data loader yield the indices of the samples beside each mini-batch; to be done before it is iterated over.

    Args:
        loader (`torch.utils.data.DataLoader`): The data loader of a data set with a length. It is changed.
    """
    # What is made from it (a share for each process, the rest of an epoch) takes these two from it.
    vars(loader)["dataset"] = IndexedDataset(loader.dataset)  # an ordinary assignment is refused
    vars(loader)["collate_fn"] = IndexedCollator(loader.collate_fn)


class PlainBatches:
    """
    A data loader with indices as callbacks see it: its mini-batches are those of the collator.

    Args:
        loader (`torch.utils.data.DataLoader`): The data loader.
    """

    def __init__(self, loader: Any):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        return (take_indices(yielded)[0] for yielded in self.loader)


def take_indices(yielded: Any) -> tuple[Any, list[int] | None]:
    """
    Take apart what such a data loader yields.

    Args:
        yielded (`Any`): The mini-batch, perhaps with indices.

    Returns:
        `tuple[Any, list[int]]`: The mini-batch as the collator made it, and the indices of its samples; `None` if
            there are none.
    """
    if isinstance(yielded, dict) and INDICES in yielded:
        return yielded[BATCH], yielded[INDICES].values
    return yielded, None
