"""Classes: which column holds them, and label noise."""

import numpy as np
import pytest
from datasets import DatasetDict

from hf_trim.data import DataArguments, load_data
from tests.support.data import labels_of, tiny_digits


def test_two_label_columns_as_in_cifar100(tmp_path):
    split = tiny_digits(20, image="img", label="fine_label", coarse_label=[0, 1] * 10)
    DatasetDict(train=split, test=split).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="several could be it: fine_label, coarse_label"):
        load_data(DataArguments(str(tmp_path)))
    data = load_data(DataArguments(str(tmp_path), label_column="coarse_label"))
    assert labels_of(data.train_dataset) == [0, 1] * 10


def test_label_noise(tmp_path):
    tiny_digits(600, size=8).save_to_disk(tmp_path)

    def train_labels(noise, **arguments):
        data = load_data(DataArguments(str(tmp_path), label_noise=noise, **arguments))
        return np.array(labels_of(data.train_dataset)), labels_of(data.test_dataset)

    right, test = train_labels(0.0)
    noisy, noisy_test = train_labels(0.2)
    assert (right != noisy).sum() == round(0.2 * len(right)) and noisy_test == test
    assert (np.bincount(noisy[right != noisy], minlength=10) > 0).all()
    assert (train_labels(0.2)[0] == noisy).all() and (train_labels(0.2, split_seed=1)[0] != noisy).any()
    for noise, match in ((1.0, "label_noise must lie in"), ("a", "label_noise must lie in")):
        with pytest.raises(ValueError, match=match):
            DataArguments("digits", label_noise=noise)
    with pytest.raises(ValueError, match="label_noise is for classes"):
        DataArguments("bbc-news", task="causal-lm", label_noise=0.1)
