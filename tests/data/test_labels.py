"""Classes: which column holds them, and label noise."""

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

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


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["good", "bad"], ["bad", "good"]),
        ([5, 1], ["1", "5"]),
        ([-1, 1], ["-1", "1"]),
        ([10, 9], ["9", "10"]),
        ([True, False], ["False", "True"]),
        ([2.0, 1.0], ["1", "2"]),
        ([1.5, 1.0], "must hold one class per sample, as whole numbers or strings, and row 1 of the training split"),
        ([0, None], r"Row 2 has no label: label_column 'label' is empty in 10 of 20 rows of the training split. Give"),
        ([0.0, float("nan")], "Row 2 has no label"),
        (["a", " "], "Row 2 has no label"),
        ([None, None], "Row 1 has no label: label_column 'label' is empty in 20 of 20 rows"),
        ([True, None], "Row 2 has no label"),
        (
            [[1], [2]],
            "label_column 'label' must hold one class per sample, as whole numbers or strings, and holds List",
        ),
    ],
)
def test_labels_of_any_simple_type(values, names, tmp_path, minilm_tokenizer):
    rows = {"text": [f"row {number}" for number in range(20)], "label": values * 10}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    args = DataArguments(str(tmp_path / "data"))
    if isinstance(names, str):
        with pytest.raises(ValueError, match=names):
            load_data(args, minilm_tokenizer)
        return
    data = load_data(args, minilm_tokenizer)
    assert data.label_names == names
    assert np.bincount(labels_of(data.train_dataset)).tolist() == [8, 8]


def test_a_missing_label_of_a_csv_file_is_found_by_its_row(tmp_path, minilm_tokenizer):
    rows = [f"row {number},{number % 2}" for number in range(20)]
    rows[16] = "row 16,"
    path = tmp_path / "reviews.csv"
    path.write_text("\n".join(["text,label", *rows]))
    with pytest.raises(ValueError, match="Row 17 has no label: label_column 'label' is empty in 1 of 20 rows"):
        load_data(DataArguments(str(path)), minilm_tokenizer)
    # Numbers with a gap are floats, and those of the other split are not.
    path.write_text("\n".join(["text,label", *rows[:16], *rows[17:]]))
    assert load_data(DataArguments(str(path)), minilm_tokenizer).label_names == ["0", "1"]
