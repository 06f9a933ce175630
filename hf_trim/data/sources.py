"""
Where data come from: embedded sets, local files and folders, the Hub.

The argument `dataset`, a name or a path → `DatasetDict` of all splits, as they are.
"""

import logging
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from hf_trim.data.embedded import load_bbc_news, load_digits, load_fashion_mnist
from hf_trim.data.names import (
    EMBEDDED,
    IMAGE_SUFFIXES,
    data_files,
    is_saved_to_disk,
    local_format,
    local_path,
)
from hf_trim.messages import closest


logger = logging.getLogger(__name__)

LOADERS = dict(zip(EMBEDDED, (load_digits, load_bbc_news, load_fashion_mnist), strict=True))
# Names of folders of images → splits.
SPLIT_FOLDERS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip


def load_splits(dataset: str, config_name: str | None, train_split: str) -> DatasetDict:
    """
    Load all splits of a data set. A warning tells which files of a folder are left out.

    Args:
        dataset (`str`): Name of an embedded set, a local path or a Hub name.
        config_name (`str`, *optional*): The configuration of a Hub data set.
        train_split (`str`): The name for the data if they have no splits.

    Returns:
        `datasets.DatasetDict`: The splits.

    Raises:
        `ValueError`: If the data cannot be found or read.
    """
    if dataset in LOADERS:
        return LOADERS[dataset]()
    path = local_path(dataset)
    try:
        if path is None:
            splits = datasets.load_dataset(dataset, config_name)
        elif is_saved_to_disk(path):
            splits = datasets.load_from_disk(str(path))
        else:
            splits = _load_files(path, dataset)
    except IndexError:  # what `datasets` raises for a folder that was saved without rows
        raise ValueError(f"dataset '{dataset}' is empty: choose another.") from None
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        if path is not None:
            raise ValueError(f"dataset '{dataset}' could not be read: {error}") from error
        raise ValueError(
            f"dataset '{dataset}' could not be loaded from the Hub ({error}). Embedded data sets are "
            f"{', '.join(EMBEDDED)}; write a local folder with './' or '/' before it." + closest(dataset, EMBEDDED)
        ) from error
    return DatasetDict({train_split: splits}) if isinstance(splits, Dataset) else splits


def _load_files(path: Path, dataset: str) -> DatasetDict:
    """A file, or a folder of images or of tables."""
    loader = local_format(path)
    if not path.is_dir():
        return datasets.load_dataset(loader, data_files=str(path))
    found = data_files(path)
    source: dict[str, Any] = {"data_dir": str(path)}
    if loader == "imagefolder":
        source["data_files"] = _split_patterns(path)
    builder = datasets.load_dataset_builder(loader, **source)
    used = {Path(file) for files in builder.config.data_files.values() for file in files}
    suffixes = IMAGE_SUFFIXES if loader == "imagefolder" else {f".{loader}"}
    left_out = [
        file.relative_to(path)
        for file in found
        if file.suffix.lower() not in suffixes | ({".csv", ".parquet"} if file.stem == "metadata" else set())
        or file not in used
    ]
    if left_out:
        reason = "names of folders" if loader == "imagefolder" else "names of files and folders"
        logger.warning(
            "dataset '%s': %d of its %d files are left out, such as %s. The splits are read from the %s (train, "
            "validation, test), and one kind of files is read.",
            dataset, len(left_out), len(found), left_out[0], reason,
        )  # fmt: skip
    builder.download_and_prepare()
    return builder.as_dataset()


def _split_patterns(path: Path) -> dict[str, list[str]]:
    """
    The images of each split. `datasets` reads splits out of any part of any file name: of a folder with one
    `a_test.png` it takes nothing else. Here only folders make splits: `train` and `test`, with a folder for each class
    in them.
    """
    images = [file.relative_to(path) for file in data_files(path, IMAGE_SUFFIXES)]
    base = Path()
    while len({file.parts[0] for file in images}) == 1 and len(images[0].parts) > 2:  # one folder that holds all
        base /= images[0].parts[0]
        images = [Path(*file.parts[1:]) for file in images]
    folders = {file.parts[0] for file in images if len(file.parts) > 1}
    splits = {folder: SPLIT_FOLDERS[folder.lower()] for folder in folders if folder.lower() in SPLIT_FOLDERS}
    # A class may be named "train" too. Then images lie in it, and no folders of classes.
    is_split = splits.keys() == folders or any(
        splits.get(file.parts[0]) == "train" and len(file.parts) > 2 for file in images
    )
    if not splits or not is_split or "train" not in splits.values():
        return {"train": [(base / "**").as_posix()]}
    patterns: dict[str, list[str]] = {}
    for folder, split in sorted(splits.items()):
        patterns.setdefault(split, []).append((base / folder / "**").as_posix())
    return patterns
