"""Local formats, and how a path is told from a Hub name."""

import pytest
import torch
from datasets import DatasetDict
from sklearn.datasets import load_digits

from hf_trim.data import DataArguments, load_data
from hf_trim.data.sources import local_path
from tests.support.data import DIGIT_NAMES, first_batch, labels_of, tiny_digits, write_pictures


@pytest.mark.parametrize("form", ["save_to_disk", "imagefolder", "parquet", "csv"])
def test_local_formats(form, tmp_path, minilm_tokenizer):
    folder = tmp_path / "data"
    splits = {"train": tiny_digits(30), "test": tiny_digits(20)}
    processing_class = None
    if form == "save_to_disk":
        DatasetDict(splits).save_to_disk(folder)
    for name, split in splits.items():
        if form == "parquet":
            folder.mkdir(exist_ok=True)
            split.to_parquet(folder / f"{name}.parquet")
        elif form == "imagefolder":
            for number, row in enumerate(split):
                (folder / name / str(row["label"])).mkdir(parents=True, exist_ok=True)
                row["image"].save(folder / name / str(row["label"]) / f"{number}.png")
        elif form == "csv":
            folder.mkdir(exist_ok=True)
            rows = [f"a text about {label},class {label}" for label in split["label"]]
            (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]))
            processing_class = minilm_tokenizer
    data = load_data(DataArguments(str(folder)), processing_class)
    assert (len(data.train_dataset), len(data.test_dataset)) == (30, 20)
    assert data.label_names == ([f"class {name}" for name in DIGIT_NAMES] if form == "csv" else DIGIT_NAMES)
    assert sorted(labels_of(data.test_dataset)) == sorted(load_digits().target[:20])
    inputs = first_batch(data, 20, "test")
    if form == "csv":
        assert inputs["input_ids"].shape[0] == 20
        return
    assert inputs["pixel_values"].shape == (20, 3, 32, 32)
    expected = load_data(DataArguments(str(folder))).processing_class(splits["test"][0]["image"], return_tensors="pt")
    if form != "imagefolder":  # which is sorted by class
        assert torch.allclose(inputs["pixel_values"][:1], expected["pixel_values"], atol=1e-6)


def test_a_folder_without_data_does_not_hide_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert len(load_data(DataArguments("digits")).train_dataset) == 1437
    assert local_path("owner/name") is None
    tiny_digits().to_parquet(tmp_path / "owner" / "name" / "train.parquet")
    assert local_path("owner/name") == tmp_path / "owner" / "name"


def sizes(folder, **arguments):
    data = load_data(DataArguments(str(folder), **arguments))
    return len(data.train_dataset), len(data.test_dataset), data.label_names


CLASSES = [f"class {number}" for number in range(4)]


@pytest.mark.parametrize(
    "names",
    [
        ["a_test_{}", "{}", "{}", "{}"],  # `datasets` would take one picture of four
        ["train {}", "test-{}", "val.{}", "eval_{}"],
        ["dev-board {}", "{}"],
    ],
)
def test_words_in_the_names_of_pictures_make_no_splits(names, tmp_path, caplog):
    write_pictures(tmp_path / "pictures", 40, names=names)
    assert sizes(tmp_path / "pictures") == (32, 8, CLASSES)
    assert not caplog.records


def test_folders_make_the_splits_of_pictures(tmp_path, caplog):
    folder = tmp_path / "pictures"
    for name, count in (("Train", 20), ("testing", 12), ("val", 8)):
        write_pictures(folder / name, count, names=["train_{}", "{}"])
    assert sizes(folder) == (20, 12, CLASSES)
    data = load_data(DataArguments(str(folder), validation_split="auto"))
    assert [len(x) for x in (data.train_dataset, data.validation_dataset, data.test_dataset)] == [20, 8, 12]
    assert not caplog.records
    write_pictures(folder / "more", 3)
    assert sizes(folder) == (20, 12, CLASSES)
    assert "3 of its 43 files are left out, such as more/class 0/0.png" in caplog.text
    # A class may be called "train".
    classes = tmp_path / "vehicles"
    write_pictures(classes, 40)
    (classes / "class 0").rename(classes / "train")
    assert sizes(classes) == (32, 8, [*CLASSES[1:], "train"])
    # One folder that holds all is passed through.
    (tmp_path / "outer").mkdir()
    folder.rename(tmp_path / "outer" / "inner")
    assert sizes(tmp_path / "outer") == (20, 12, CLASSES)


def test_tables_that_are_left_out_are_named(tmp_path, caplog, minilm_tokenizer):
    for name in ("train", "more", "reviews"):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "\n".join(f"row {i},{i % 2}" for i in range(20)))
    data = load_data(DataArguments(str(tmp_path)), minilm_tokenizer)
    assert len(data.train_dataset) == 16
    assert "2 of its 3 files are left out, such as more.csv" in caplog.text
