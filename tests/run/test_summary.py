"""Summaries that earlier versions wrote, without fields that have come since."""

import pytest

from hf_trim.files import write_json
from hf_trim.hub.model_card import render_card
from hf_trim.run.records import used_hardware
from hf_trim.run.summary import SUMMARY, read_summary
from hf_trim.run.train import write_card
from tests.support.helpers import record


# As the first version that pushed to the Hub wrote it.
FIRST = {
    "architecture": None, "base_model": None, "channels": 3, "command": "python -m hf_trim.run tiny --compare",
    "dataset_config": None, "dataset_names": ["digits"], "datasets": [], "epochs": 2.0, "hardware": "2 CPU cores",
    "history": [{"epoch": 1.0, "full_loss": 2.31, "loss": 2.31, "keep_fraction": 1.0}],
    "hyperparameters": {"learning_rate": "0.002", "seed": "42"}, "includes_evaluation": False, "language": None,
    "library": "transformers", "license": None, "metrics": {"accuracy": 0.05, "error": 95.0, "loss": 2.32},
    "model_class": "ViTForImageClassification", "model_name": "tiny", "seed": 42, "split": "the test split",
    "tags": [], "task": "image-classification", "train_seconds": 0.72,
    "trim": {"trim_keep_end": 0.3, "trim_schedule": "epoch", "trim_select": "hardest", "trim_keep_start": 1.0},
    "versions": {"hf_trim": "0.1.0", "torch": "2.13.0"},
}  # fmt: skip


def test_the_card_of_a_training_of_the_first_version(tmp_path):
    write_json(tmp_path / "run.json", FIRST)
    for seed in (42, 43):
        write_json(tmp_path / "records" / f"trimmed-seed{seed}.json", record("trimmed", seed, 4.0))
    write_card(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "p fell from 1.0 to 0.3 by epoch, over 2 epochs." in card and "| 1.0 | 1.0 |" in card
    assert "This model is that of the arm *trimmed* with seed 42." in card


@pytest.mark.parametrize("trim", [{}, {"trim_schedule": "step"}, {"trim_select": "none"}], ids=str)
def test_any_field_may_be_missing(trim, tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"trim": trim, "metrics": {"error": 5.0}})
    today = read_summary(path)
    assert (
        SUMMARY.keys() | {"origin", "trims", "schedule_unit", "planned", "done", "trim", "model_name"} == today.keys()
    )
    assert "p fell from" not in str(render_card(today, None, tmp_path)) or trim != {"trim_select": "none"}
    write_json(path, {**FIRST, "trim": {**FIRST["trim"], **trim}})
    for name in FIRST:
        write_json(path, {key: value for key, value in FIRST.items() if key != name})
        assert "hf_trim" in str(render_card(read_summary(path), None, tmp_path))


def test_threads_are_told_where_they_are_not_as_many_as_cores(monkeypatch):
    monkeypatch.setattr("hf_trim.run.records.hardware", lambda: "2 CPU cores")
    for threads, told in ((1, "2 CPU cores, 1 thread"), (2, "2 CPU cores"), (4, "2 CPU cores, 4 threads")):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        assert used_hardware() == told
