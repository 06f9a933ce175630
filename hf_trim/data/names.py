"""What the argument `dataset` names: an embedded set, a local path or a set on the Hub. Nothing is loaded."""

import re
from pathlib import Path


EMBEDDED = ("digits", "bbc-news", "fashion-mnist")
HUB_NAMES = {"fashion-mnist": "zalando-datasets/fashion_mnist"}  # of embedded sets that are on the Hub too
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
TABLE_SUFFIXES = {".parquet": "parquet", ".csv": "csv"}


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
    if could_be_hub_name and path.suffix not in TABLE_SUFFIXES:
        # A folder of the same name counts only if it holds data: the output folder of a run must not hide a Hub name.
        return path.resolve() if path.is_dir() and (is_saved_to_disk(path) or local_format(path)) else None
    if not path.exists():
        raise ValueError(f"dataset '{dataset}' looks like a local path, and there is no such file or folder.")
    if not is_saved_to_disk(path) and not local_format(path):
        raise ValueError(
            f"dataset '{dataset}' is neither a save_to_disk folder nor one with images, Parquet or CSV files, nor a "
            ".parquet or .csv file."
        )
    return path.resolve()


def is_saved_to_disk(path: Path) -> bool:
    """
    Args:
        path (`pathlib.Path`): A file or folder.

    Returns:
        `bool`: Whether `datasets` wrote it with `save_to_disk`.
    """
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def local_format(path: Path) -> str | None:
    """
    Args:
        path (`pathlib.Path`): A file or folder.

    Returns:
        `str` or `None`: The name of the loader in `datasets` for a file, or for the commonest kind of file in a
            folder; `None` if there is no such file.
    """
    loaders = dict(TABLE_SUFFIXES)
    if path.is_dir():  # a single image is no data set
        loaders.update(dict.fromkeys(IMAGE_SUFFIXES, "imagefolder"))
    suffixes = [file.suffix.lower() for file in (data_files(path) if path.is_dir() else [path])]
    names = [loaders[suffix] for suffix in suffixes if suffix in loaders]
    # Sorted, so that a tie has the same winner each time.
    return max(sorted(set(names)), key=names.count) if names else None


def data_files(folder: Path, suffixes: set[str] | None = None) -> list[Path]:
    """
    Args:
        folder (`pathlib.Path`): A folder.
        suffixes (`set[str]`, *optional*): Endings of the files, in lower case; by default those of images and tables.

    Returns:
        `list[pathlib.Path]`: Its files with such an ending, at any depth, sorted. Hidden ones are no data.
    """
    suffixes = IMAGE_SUFFIXES | set(TABLE_SUFFIXES) if suffixes is None else suffixes
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in suffixes and not any(part[0] in "._" for part in file.relative_to(folder).parts)
    ]
