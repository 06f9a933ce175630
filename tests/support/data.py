"""Small data sets with the schemas of the Hub's, and a look into prepared ones."""

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from hf_trim.data import DeviceImages


DIGIT_NAMES = [str(digit) for digit in range(10)]


def tiny_digits(n=20, size=32, image="image", label="label", names=DIGIT_NAMES, **columns):
    """Digits in colour at the Hub sets' size, under the Hub sets' column names; `columns` come in addition."""
    digits = load_digits()
    pixels = np.rint(digits.images[:n] * 255 / 16).astype(np.uint8).repeat(size // 8, 1).repeat(size // 8, 2)
    features = {image: Image(), label: ClassLabel(names=names)}
    features.update({name: ClassLabel(names=DIGIT_NAMES) for name in columns})
    data = {image: list(np.stack([pixels] * 3, -1)), label: digits.target[:n].tolist(), **columns}
    return Dataset.from_dict(data, features=datasets.Features(features))


def labels_of(split):
    return split.labels.tolist() if isinstance(split, DeviceImages) else split.with_format(None)["labels"][:]


def first_batch(data, size=4, split="train"):
    return next(iter(DataLoader(getattr(data, f"{split}_dataset"), batch_size=size, collate_fn=data.data_collator)))


def write_pictures(folder, n, size=8, names=("{}",), classes=4):
    """`n` digits as PNG files with a folder for each of some classes; `names` are the patterns of the files' names."""
    for number, row in enumerate(tiny_digits(n, size=size)):
        path = folder / f"class {number % classes}" / f"{names[number // classes % len(names)].format(number)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    return folder
