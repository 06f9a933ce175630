"""The embedded data sets are whole and right."""

import gzip
import struct

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import hf_trim.data.embedded
from hf_trim.data import DataArguments, load_data, package_folder
from hf_trim.data.embedded import load_bbc_news
from tests.support.data import DIGIT_NAMES, first_batch, labels_of


def test_digits():
    data = load_data(DataArguments("digits", image_channels=1))
    assert (data.kind, data.image_size, data.num_channels, data.label_names) == ("image", 8, 1, DIGIT_NAMES)
    assert (len(data.train_dataset), len(data.test_dataset)) == (1437, 360)
    total = np.bincount(load_digits().target)
    assert np.abs(np.bincount(labels_of(data.test_dataset)) - total * 0.2).max() <= 1  # stratified
    images = first_batch(data, 1437)["pixel_values"]
    assert images.shape == (1437, 1, 8, 8) and images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    # Every image is one of scikit-learn's, with its label, and the splits share no row of it.
    digits = load_digits()
    digit_of = {image.tobytes(): digit for image, digit in zip(digits.images, digits.target, strict=True)}
    grey = ((images + 1) * 8).round().double().numpy()
    assert [digit_of[image.tobytes()] for image in grey] == labels_of(data.train_dataset)


def test_bbc_news(minilm_tokenizer):
    raw = load_bbc_news()["train"]
    assert len(raw) == len(set(raw["text"])) == 2127
    assert raw.features["label"].names == ["business", "entertainment", "politics", "sports", "tech"]
    data = load_data(DataArguments("bbc-news", max_seq_length=32, max_train_samples=64), minilm_tokenizer)
    assert (data.kind, len(data.train_dataset), len(data.test_dataset)) == ("text", 64, 426)
    share = np.bincount(raw["label"]) / len(raw)
    assert np.abs(np.bincount(labels_of(data.test_dataset)) / 426 - share).max() < 0.003
    inputs = first_batch(data)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (4, 32)
    assert inputs["labels"].dtype == torch.int64


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_fashion_mnist(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_trim.data.embedded, "FASHION_MNIST_FOLDER", tmp_path)
    with pytest.raises(ValueError, match="apt-get install dataset-fashion-mnist"):
        load_data(DataArguments("fashion-mnist"))
    images = np.arange(30 * 28 * 28, dtype=np.uint8).reshape(30, 28, 28)
    for prefix, n in (("train", 30), ("t10k", 20)):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images[:n])
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8) % 10)
    data = load_data(DataArguments("fashion-mnist", image_channels=1))
    assert (len(data.train_dataset), len(data.test_dataset), data.label_names[9]) == (30, 20, "Ankle boot")
    pixels = (first_batch(data, 30)["pixel_values"][:, 0] * 0.5 + 0.5) * 255
    assert np.array_equal(pixels.round().byte().numpy(), images)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images[0])
    with pytest.raises(ValueError, match="not an idx file with 3 dimensions"):
        load_data(DataArguments("fashion-mnist"))


def test_a_missing_package_is_named_with_its_command():
    with pytest.raises(ValueError, match="run `pip install no-such`"):
        package_folder("no_such", "data", "no-such")
