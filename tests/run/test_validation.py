"""A validation split: tests during training, early stopping and the best model; the test split is looked at once."""

import json
import re
import signal

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_trim.data import DataArguments, DeviceImages, load_data
from hf_trim.data.load import read_data
from hf_trim.run.__main__ import main
from hf_trim.run.recipe import parse
from hf_trim.run.records import read_record
from hf_trim.run.trainer import make_trainer
from tests.support.data import tiny_digits
from tests.support.forked import Forked


def texts(first, count):
    columns = {"text": [f"row {number}" for number in range(first, first + count)], "label": [0, 1] * (count // 2)}
    return Dataset.from_dict(columns, features=Features({"text": Value("string"), "label": ClassLabel(2)}))


def ids(split):
    return {int(text.split()[1]) for text in split["text"]}


@pytest.mark.parametrize(
    ("saved", "arguments", "expected"),
    [
        ({"train": 100}, {}, {"train": 80, "test": 20}),
        ({"train": 100}, {"validation_fraction": 0.3}, {"train": 50, "test": 20, "validation": 30}),
        ({"train": 100, "test": 10}, {"validation_split": "auto"}, {"train": 90, "test": 10, "validation": 10}),
        ({"train": 100, "dev": 6}, {"validation_split": "auto"}, {"train": 80, "test": 20, "validation": 6}),
        ({"train": 100, "dev": 6, "test": 8}, {}, {"train": 100, "test": 8}),
        ({"train": 100, "test": 8}, {"validation_split": "test"}, {"train": 80, "test": 20, "validation": 8}),
        (
            {"train": 100, "validation": 6}, {"validation_split": "auto", "test_split": "validation"},
            {"train": 90, "test": 6, "validation": 10},
        ),
    ],
)  # fmt: skip
def test_the_splits_share_no_row_and_are_stratified(saved, arguments, expected, tmp_path):
    first = np.cumsum([0, *saved.values()])
    rows = {name: texts(start, count) for (name, count), start in zip(saved.items(), first[:-1], strict=True)}
    DatasetDict(rows).save_to_disk(tmp_path / "data")
    splits = read_data(DataArguments(str(tmp_path / "data"), **arguments)).splits
    assert {name: len(split) for name, split in splits.items()} == expected
    parts = [ids(split) for split in splits.values()]
    assert len(set().union(*parts)) == sum(map(len, parts))
    assert all(np.ptp(np.bincount(split["labels"][:])) == 0 for split in splits.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation_split": "dev"}, "validation_split 'dev' is not in dataset"),
        ({"validation_split": "train"}, "validation_split must differ from train_split, and both are 'train'"),
        ({"validation_split": "dev", "validation_fraction": 0.1}, "exclude each other: give the name of a split"),
        ({"validation_fraction": 2}, "validation_fraction must lie between 0 and 1, and is 2"),
        ({"validation_fraction": 0.001}, r"2 validation samples of 1437 .* leave no room for 10 classes"),
    ],
)
def test_wrong_validation_splits(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_data(DataArguments("digits", **arguments))


def test_the_part_held_out_for_tests_does_not_depend_on_validation(tmp_path):
    tiny_digits(200, size=8).save_to_disk(tmp_path)
    plain = load_data(DataArguments(str(tmp_path)))
    validated = load_data(DataArguments(str(tmp_path), validation_fraction=0.1, augment="crop", label_noise=0.5))
    assert isinstance(validated.validation_dataset, DeviceImages) and validated.validation_dataset.augment == "none"
    assert plain.test_dataset.images.equal(validated.test_dataset.images)
    assert plain.eval_dataset is plain.test_dataset and validated.eval_dataset is validated.validation_dataset


@pytest.mark.parametrize("metric, is_greater_better", [("error", False), ("eval_loss", False), ("accuracy", True)])
def test_the_best_model_is_the_best(metric, is_greater_better, recipe):
    job = parse(recipe, ["--early_stopping_patience", "2", "--metric_for_best_model", metric])
    assert job.training.greater_is_better is is_greater_better


def test_early_stopping_needs_no_other_option(recipe, tmp_path):
    job = parse(recipe, ["--early_stopping_patience", "2"])
    assert (job.training.load_best_model_at_end, job.data.validation_split) == (True, "auto")
    assert job.settings["validation_split"] == "auto"
    job = parse(recipe, ["--load_best_model_at_end", "--validation_fraction", "0.2"])
    assert (job.data.validation_split, job.data.validation_fraction) == (None, 0.2)
    assert parse(recipe, []).data.validation_split is None
    assert main([recipe, "--early_stopping_patience", "0", "--output_dir", str(tmp_path)]) == 2


# A learning rate of 0 never lowers the loss: the second and third tests are no better than the first.
STOPPED = ["--learning_rate", "0", "--early_stopping_patience", "2", "--num_train_epochs", "9", "--seed", "1"]


def test_a_stopped_training_takes_the_best_model_and_looks_at_the_test_split_once(recipe, tmp_path):
    out = tmp_path / "out"
    status, output = Forked("hf_trim", "run", recipe, *STOPPED, "--output_dir", out).finish()
    assert status == 0, output
    assert "64 rows to train on, 180 to validate on (held out of the training split), 60 to test on" in output
    state = json.loads((out / "trainer_state.json").read_text())
    assert [log["epoch"] for log in state["log_history"] if "eval_error" in log] == [1, 2, 3]
    assert [log["epoch"] for log in state["log_history"] if "test_error" in log] == [3]
    assert state["best_global_step"] == 4
    results = json.loads((out / "all_results.json").read_text())
    job = parse(recipe, [*STOPPED, "--output_dir", str(out)])
    data = load_data(job.data)
    trainer = make_trainer(job, data, {}, 1, tmp_path / "other")
    # The model that was never changed, on the splits themselves.
    assert results["eval_error"] == pytest.approx(trainer.evaluate(data.test_dataset)["eval_error"])
    assert results["validation_error"] == pytest.approx(trainer.evaluate(data.validation_dataset)["eval_error"])
    assert re.search(rf"Test error {results['eval_error']:.2f} %", output)


def test_a_killed_training_knows_how_long_it_has_waited(recipe, tmp_path):
    out = tmp_path / "out"
    options = [recipe, *STOPPED, "--output_dir", out]
    assert Forked("hf_trim", "run", *options, kill=("step", 9)).finish()[0] == -signal.SIGKILL
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    status, output = Forked("hf_trim", "run", *options).finish()
    assert status == 0, output
    state = json.loads((out / "trainer_state.json").read_text())
    assert [log["epoch"] for log in state["log_history"] if "eval_error" in log] == [1, 2, 3]
    # Killed between the end of the training and its final test.
    results = json.loads((out / "all_results.json").read_text())
    for name in ("all_results.json", "trainer_state.json", "model.safetensors"):
        (out / name).unlink()
    assert main([str(option) for option in options]) == 0
    state = json.loads((out / "trainer_state.json").read_text())
    assert [log["epoch"] for log in state["log_history"] if "eval_error" in log] == [1, 2, 3]
    assert json.loads((out / "all_results.json").read_text())["eval_error"] == results["eval_error"]


def test_a_record_says_which_tests_were_of_the_validation_split(recipe, tmp_path, no_plots):
    options = [recipe, "--compare", "--seeds", "1", "--arms", "plain", "--validation_fraction", "0.1"]
    assert main([*options, "--num_train_epochs", "2", "--output_dir", str(tmp_path / "out")]) == 0
    record = read_record(tmp_path / "out" / "records" / "plain-seed42.json")
    assert ["validation_error" in entry for entry in record["history"]] == [True, True]
    assert ["test_error" in entry for entry in record["history"]] == [False, True]
    assert record["history"][-1]["test_error"] == record["test_error"]
    assert record["history"][-1]["validation_error"] == record["validation_error"]
    assert record["settings"]["validation_fraction"] == 0.1


def test_a_checkpoint_to_resume_from_must_be_there(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    options = [recipe, "--output_dir", str(out), "--num_train_epochs", "2"]
    missing = ["--resume_from_checkpoint", str(out / "checkpoint-9")]
    assert main([*options, *missing]) == 2
    assert f"resume_from_checkpoint: there is no folder {out / 'checkpoint-9'}." in capsys.readouterr().err
    assert not (out / "settings.json").exists()
    assert main([*options, "--num_train_epochs", "1", "--output_dir", str(tmp_path / "first")]) == 0
    first = tmp_path / "first" / "checkpoint-4"
    assert main([*options, "--resume_from_checkpoint", str(first), "--compare"]) == 2
    assert "--resume_from_checkpoint has no effect with --compare" in capsys.readouterr().err
    assert main([*options, "--resume_from_checkpoint", str(first)]) == 0
    state = json.loads((out / "trainer_state.json").read_text())
    assert [log["step"] for log in state["log_history"] if "loss" in log] == [4, 8]
    assert len(list(out.glob("checkpoint-*"))) == 1  # the first epoch was not trained here
    (first / "trainer_state.json").unlink()
    assert main([*options, "--resume_from_checkpoint", str(first)]) == 2
    assert "is no complete checkpoint (trainer_state.json is missing or torn)" in capsys.readouterr().err
    assert main([*options, "--resume_from_checkpoint", str(first.with_name("checkpoint-5"))]) == 2
    assert "Beside it are checkpoint-4." in capsys.readouterr().err
