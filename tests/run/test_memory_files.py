"""What a run writes of the memory of losses: a table, a data map and a page."""

import re

import numpy as np
import pytest
import yaml
from datasets import Dataset
from PIL import Image

from hf_trim.data import DataArguments, load_data
from hf_trim.report.sample_page import write_sample_page
from hf_trim.run.__main__ import main
from hf_trim.trainer.memory import SampleMemory
from tests.support.recipes import TEXT, TINY


def run(folder, recipe, *options):
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main([str(path), "--output_dir", str(folder / "out"), "--trim_memory", "True", *options]) == 0
    return folder / "out"


def read(out):
    page = (out / "hard_samples.html").read_text(encoding="utf-8")
    table = Dataset.from_parquet(str(out / "trim_memory.parquet"), cache_dir=str(out.parent / "cache"))
    return page, table, (out / "README.md").read_text(encoding="utf-8")


def test_pictures_are_shown_only_if_asked(tmp_path):
    out = run(tmp_path, TINY, "--show_samples")
    page, table, card = read(out)
    assert len(table) == 64 and set(table["seen"][:]) == {3} and len(table[0]["losses"]) == 3
    assert np.allclose(np.mean(table["losses"][:], 1), table["mean_loss"][:], rtol=2e-3)  # halves
    with Image.open(out / "data_map.png") as picture:
        assert picture.width > 500
    assert "[hard_samples.html](hard_samples.html)" in card and "![Data map](data_map.png)" in card
    assert page.count('alt="sample ') == 60 and page.count("<polyline") == 60  # three tables of 20
    assert page.count("data:image/png;base64,") == 61 and "http" not in page.replace("https://arxiv.org", "")
    # The hardest first, with its picture, its row in the data and its class.
    hardest = max(table, key=lambda row: row["mean_loss"])
    first = page.split("<h2>The hardest</h2>")[1].split("<tr>")[2]
    cells = re.findall(r'<td class="number">(.*?)</td>', first)
    assert cells[:2] == [str(hardest["row"]), str(hardest["index"])]
    assert f"<td>{hardest['label']}</td>" in first
    data = load_data(DataArguments(dataset="digits", image_channels=1, max_train_samples=64))
    assert data.rows[:] == table["row"][:]
    assert data.show(hardest["index"]).size == (8, 8)


def test_private_texts_stay_where_they_are(tmp_path):
    page, table, card = read(run(tmp_path, TEXT))
    data = load_data(DataArguments(dataset="bbc-news", max_train_samples=64), tokenizer())
    words = data.show(int(np.argmax(table["mean_loss"][:]))).split()
    assert "<th>sample</th>" not in page and "<img" in page and " ".join(words[:4]) not in page
    assert "Candidates for wrong labels" in page and "sport" in page
    assert "hard_samples.html" in card
    assert 0 <= min(table["confidence"][:]) and max(table["confidence"][:]) <= 1


def tokenizer():
    from hf_trim.run.models import ModelArguments, load_processing_class

    return load_processing_class(ModelArguments(model_type="bert", tokenizer_name="minilm"))


def test_blocks_of_a_language_model(small_gpt2, tmp_path):
    out = tmp_path / "out"
    options = ["--trim_memory", "True", "--show_samples", "--max_train_samples", "16", "--output_dir", str(out)]
    assert main([*small_gpt2, *options]) == 0
    page, table, _ = read(out)
    assert "label" not in table.column_names and "row" not in table.column_names
    assert "Candidates" not in page and not (out / "data_map.png").exists()
    assert page.count('<td class="sample">') >= 16


def test_texts_are_escaped_and_cut(tmp_path):
    memory = SampleMemory(3, 2)
    values = np.array([[1.0, 1, 0.4, 0, 0], [2.0, 1, 0.1, 1, 0]]).T
    for epoch in range(2):
        memory.update(np.array([0, 2]), np.full(2, epoch), values)
    page = tmp_path / "page.html"
    write_sample_page(memory, page, "<b>", ["cat & dog", "<i>"], show=lambda index: "<script>" + "x" * 1000)
    text = page.read_text(encoding="utf-8")
    assert "<script>" not in text and "<i>" not in text and "cat &amp; dog" in text and "x" * 500 not in text
    assert "Of 3 training samples, 2 were seen" in text and "most often kept" not in text  # all were
    assert len(text) < 20000


def test_samples_are_shown_with_a_memory_only(recipe, capsys):
    assert main([recipe, "--show_samples"]) == 2
    assert "--show_samples has no effect without --trim_memory" in capsys.readouterr().err


@pytest.mark.parametrize("held_out", [False, True])
def test_rows_are_those_of_the_file(held_out, tmp_path):
    texts = [f"text number {number}" for number in range(40)]
    rows = {"text": texts, "label": [number % 2 for number in range(40)]}
    Dataset.from_dict(rows).to_csv(tmp_path / "train.csv", index=False)
    if not held_out:
        Dataset.from_dict(rows).to_csv(tmp_path / "test.csv", index=False)
    data = load_data(DataArguments(dataset=str(tmp_path), max_train_samples=20), tokenizer())
    assert len(data.rows) == 20 and [data.show(i) for i in range(20)] == [texts[row] for row in data.rows]
