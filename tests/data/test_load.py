"""Wrong arguments and wrong data are refused with a message that says what to change."""

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Value

from hf_trim.data import DataArguments, load_data


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"augment": "crop_flip"}, "augment must be .* Did you mean 'crop-flip'"),
        ({"image_channels": 4}, "image_channels must be 1 .* is 4"),
        ({"image_size": 0}, "image_size must be a whole number from 1, and is 0"),
        ({"max_train_samples": -1}, "max_train_samples must be a whole number"),
        ({"test_fraction": 20}, "test_fraction must lie between 0 and 1, and is 20"),
        ({"split_seed": -1}, "split_seed must be"),
        ({"image_mean": [0.5]}, "image_mean must be a list of 3 numbers"),
        ({"image_std": [0.0, 1.0, 1.0]}, "image_std must be above 0"),
        ({"dataset": ""}, "dataset must be"),
        ({"train_split": "trian"}, "train_split 'trian' is not in .* which has train. Did you mean 'train'"),
        ({"test_split": "validation"}, "test_split 'validation' is not in"),
        ({"test_split": "train"}, "test_split must differ from train_split"),
        ({"label_column": "lable"}, "label_column 'lable' is not a column .* has image, label. Did you mean 'label'"),
        ({"label_column": "image"}, "image"),
        ({"image_column": "image", "text_column": "label"}, "exclude each other"),
        ({"text_column": "image"}, "text_column 'image' must hold strings"),
        ({"test_fraction": 0.001}, "no room for 10 classes"),
        ({"dataset": "./nowhere"}, "looks like a local path"),
        ({"dataset": "digit"}, "could not be loaded from the Hub.* Did you mean 'digits'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_data(DataArguments(**{"dataset": "digits", **arguments}))


def table(values, **features):
    columns = {"text": [f"row {number}" for number in range(len(values))], "label": values}
    return Dataset.from_dict(columns, features=datasets.Features({"text": Value("string"), **features}))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (table([], label=Value("int64")), None, "is empty: choose another"),
        (table([1] * 8, label=Value("int64")), None, "label_column 'label' has one class only"),
        (table([0.5, 1.5] * 4, label=Value("float64")), None, "one class per sample"),
        (table([0, None] * 4, label=Value("int64")), None, "is empty in 4 of 8 rows of the training split"),
        (table([0, 1, 1, 1, 1], label=Value("int64")), None, "the class '0' has one sample"),
        (table([0, 1], label=Value("int64")), table([0, 7], label=Value("int64")), "none of the 2 classes: 7"),
        (
            table([0, 1], label=ClassLabel(names=["a", "b"])),
            table([-1, -1], label=ClassLabel(names=["a", "b"])),
            "labels are held back",
        ),
        (
            table([0, 1], label=ClassLabel(names=["a", "b"])),
            table([0, 1], label=ClassLabel(names=["b", "a"])),
            "same classes",
        ),
        (table([0, 1] * 4, label=Value("int64")).remove_columns("label"), None, "label_column must be given"),
        (table([0, 1] * 4, label=Value("int64")).remove_columns("text"), None, "text_column .* must be given"),
        (
            table([0, 1], label=Value("int64")),
            table([0, 1], label=Value("int64")).remove_columns("text"),
            "test split lacks the column text",
        ),
    ],
)
def test_wrong_data(train, test, message, tmp_path, minilm_tokenizer):
    DatasetDict({"train": train} | ({"test": test} if test else {})).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_data(DataArguments(str(tmp_path)), minilm_tokenizer)
