"""Local formats, and how a path is told from a Hub name."""

import pytest
import torch
from datasets import DatasetDict
from sklearn.datasets import load_digits

from hf_trim.data import DataArguments, load_data
from hf_trim.data.sources import local_path
from tests.support.data import DIGIT_NAMES, first_batch, labels_of, tiny_digits


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
