"""Trackers: one run each for the runs of a comparison, with the final test in it."""

import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_trim.run.__main__ import main
from hf_trim.run.recipe import parse
from hf_trim.run.trainer import load_job_data, make_trainer


def test_each_run_of_a_comparison_is_one_run_of_a_tracker(recipe, tmp_path, monkeypatch, no_plots):
    ended = []
    wandb = SimpleNamespace(run="a run", finish=lambda: ended.append("run"), __spec__=ModuleSpec("wandb", None))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
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


@pytest.mark.parametrize("given", [["tensorboard", "tensorboard"], ["tensorboard,tensorboard"], ["all"]])
def test_several_trackers(given, recipe):
    names = parse(recipe, ["--report_to", *given]).training.report_to
    assert "tensorboard" in names and "none" not in names
    assert given == ["all"] or names == ["tensorboard"]


def test_trackio_adds_no_run_to_that_of_another_folder(recipe, tmp_path):
    for options, project in (([], "out"), (["--project", "mine"], "mine")):
        job = parse(recipe, ["--output_dir", str(tmp_path / "out"), *options])
        trainer = make_trainer(job, load_job_data(job), {}, 0, tmp_path / "out" / "plain-seed0")
        assert trainer.args.project == project and "project" not in job.settings
