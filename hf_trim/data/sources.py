"""
Where data come from: embedded sets, local files and folders, the Hub.

The argument `dataset`, a name or a path → `DatasetDict` of all splits, as they are.
"""

import re
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict

from hf_trim.data.embedded import load_bbc_news, load_digits, load_fashion_mnist
from hf_trim.messages import closest


EMBEDDED = {"digits": load_digits, "bbc-news": load_bbc_news, "fashion-mnist": load_fashion_mnist}
HUB_NAMES = {"fashion-mnist": "zalando-datasets/fashion_mnist"}  # of embedded sets that are on the Hub too
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


def load_splits(dataset: str, config_name: str | None, train_split: str) -> DatasetDict:
    """
    Load all splits of a data set.

    Args:
        dataset (`str`): Name of an embedded set, a local path or a Hub name.
        config_name (`str`, *optional*): The configuration of a Hub data set.
        train_split (`str`): The name for the data if they have no splits.

    Returns:
        `datasets.DatasetDict`: The splits.

    Raises:
        `ValueError`: If the data cannot be found or read.
    """
    if dataset in EMBEDDED:
        return EMBEDDED[dataset]()
    path = local_path(dataset)
    try:
        if path is None:
            splits = datasets.load_dataset(dataset, config_name)
        elif _is_saved_to_disk(path):
            splits = datasets.load_from_disk(str(path))
        else:
            source = {"data_dir": str(path)} if path.is_dir() else {"data_files": str(path)}
            splits = datasets.load_dataset(_local_format(path), **source)
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


def local_path(dataset: str) -> Path | None:
    """
    Tell local paths from Hub names.

    Args:
        dataset (`str`): The argument, not the name of an embedded set.

    Returns:
        `pathlib.Path` or `None`: The absolute path; `None` for a Hub name.

    Raises:
        `ValueError`: If it is a path, and there are no data.
    """
    path = Path(dataset).expanduser()
    could_be_hub_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", dataset) is not None
    if could_be_hub_name and path.suffix not in (".csv", ".parquet"):
        # A folder of the same name counts only if it holds data: the output folder of a run must not hide a Hub name.
        return path.resolve() if path.is_dir() and (_is_saved_to_disk(path) or _local_format(path)) else None
    if not path.exists():
        raise ValueError(f"dataset '{dataset}' looks like a local path, and there is no such file or folder.")
    if not _is_saved_to_disk(path) and not _local_format(path):
        raise ValueError(
            f"dataset '{dataset}' is neither a save_to_disk folder nor one with images, Parquet or CSV files, nor a "
            ".parquet or .csv file."
        )
    return path.resolve()


def _is_saved_to_disk(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _local_format(path: Path) -> str | None:
    """The name of the loader in `datasets` for a file, or for the commonest kind of file in a folder."""
    loaders = {".parquet": "parquet", ".csv": "csv"}
    if path.is_dir():  # a single image is no data set
        loaders.update(dict.fromkeys(IMAGE_SUFFIXES, "imagefolder"))
    suffixes = [file.suffix.lower() for file in (path.rglob("*") if path.is_dir() else [path])]
    names = [loaders[suffix] for suffix in suffixes if suffix in loaders]
    # Sorted, so that a tie has the same winner each time.
    return max(sorted(set(names)), key=names.count) if names else None
