"""Classes: which column holds them, and label noise."""

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from hf_trim.data import DataArguments, load_data
from hf_trim.data.load import read_data
from hf_trim.data.summary import first_rows
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


STARS = [1 + number // 2 % 3 for number in range(60)]
FILMS = {
    "number": list(range(60)),
    "day": [f"2024-01-{number % 28 + 1:02d}" for number in range(60)],
    "review": [f"what I think of film {number}" for number in range(60)],
    "length": [number / 7 for number in range(60)],
}


def films(folder, **columns):
    Dataset.from_dict({**FILMS, **columns}).save_to_disk(folder)
    return DataArguments(str(folder))


def test_columns_without_usual_names_are_found_by_their_values(tmp_path, caplog):
    raw = read_data(films(tmp_path, stars=STARS))
    assert (raw.columns.label, raw.columns.inputs) == ("stars", "review")
    assert "label_column is not given, and 'stars' is taken: the only column whose values repeat (3" in caplog.text
    assert "text_column is not given, and 'review' is taken: the only column of texts" in caplog.text
    # Each class is shown: the first two rows are of one.
    shown = first_rows(raw.splits["train"].sort("number"), raw.columns)
    assert sorted(label for _, label in shown) == ["1", "2", "3"]


def test_columns_that_could_be_the_labels_are_proposed(tmp_path):
    with pytest.raises(ValueError) as refusal:
        read_data(films(tmp_path, stars=STARS, verified=["yes", "no"] * 30))
    message = str(refusal.value)
    assert "several could be it: verified, stars. Add --label_column and its name." in message
    assert "\n  day: 2024-01-01 (28 different values)\n  review: what I think of film 0 (60 " in message
    assert "\n  length: 0.0 (60 different values)" in message
    with pytest.raises(ValueError, match="label_column must be given .*: none looks like it"):
        read_data(films(tmp_path / "none"))
