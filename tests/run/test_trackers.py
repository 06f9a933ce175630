"""Trackers: one run each for the runs of a comparison, with the final test in it."""

import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_trim.run.__main__ import main


def test_each_run_of_a_comparison_is_one_run_of_a_tracker(recipe, tmp_path, monkeypatch, no_plots):
    ended = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run="a run", finish=lambda: ended.append("run")))
    options = ["--compare", "--seeds", "1", "--arms", "plain", "trimmed", "--num_train_epochs", "2"]
    options += ["--report_to", "tensorboard", "--validation_fraction", "0.1", "--output_dir", str(tmp_path / "out")]
    assert main([recipe, *options]) == 0
    assert ended == ["run", "run"]  # else the second training would be added to the run of the first
    folders = sorted((tmp_path / "out" / "runs").iterdir())
    assert [folder.name for folder in folders] == ["tiny-plain-seed42", "tiny-trimmed-seed42"]
    for folder in folders:
        (file,) = folder.iterdir()
        events = EventAccumulator(str(file)).Reload()
        assert [event.step for event in events.Scalars("eval/error")] == [4, 8]
        assert [event.step for event in events.Scalars("test/error")] == [8]
        assert [event.value for event in events.Scalars("train/keep_fraction")] == (
            [1, 1] if "plain" in folder.name else [1, pytest.approx(0.2)]
        )
