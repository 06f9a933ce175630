"""Runs without a recipe, the recipe that `hf-trim init` writes, `--dry_run`, `--print_config`."""

import json
import os
import re

import pytest
import yaml
from datasets import DatasetDict

from hf_trim.run import init
from hf_trim.run.__main__ import main
from hf_trim.run.recipe import parse, read_recipe
from tests.support.data import tiny_digits, write_pictures
from tests.support.forked import Forked
from tests.support.recipes import TEXT, TINY


@pytest.fixture
def reviews(tmp_path):
    path = tmp_path / "reviews.csv"
    words = ["good and fine", "bad or poor", "so so"]
    rows = [f"{words[number % 3]} {number},{number % 3 + 1}" for number in range(60)]
    path.write_text("\n".join(["review,score", *rows]))
    return path


@pytest.fixture
def columns(reviews):
    return ["--dataset", str(reviews), "--text_column", "review", "--label_column", "score"]


BERT = ["--model_type", "bert", "--tokenizer_name", "minilm", "--config_overrides",
        json.dumps(TEXT["model"]["config_overrides"]), "--use_cpu", "--max_seq_length", "8"]  # fmt: skip


def test_a_csv_file_is_trained_on_without_a_recipe(columns, tmp_path):
    out = tmp_path / "out"
    options = [*columns, *BERT, "--num_train_epochs", "2", "--learning_rate", "0.01", "--output_dir", out]
    status, output = Forked("hf_trim", "run", *options).finish()
    assert status == 0, output
    assert (
        "48 rows to train on, 12 to test on (held out of the training split)\n  3 classes to train on: 1 (16), 2 (16)"
        in output
    )
    assert "eval_error" in json.loads((out / "all_results.json").read_text())
    # An epoch has a test and a checkpoint.
    assert len(list(out.glob("checkpoint-*"))) == 2


def test_what_a_run_without_a_recipe_is_called_and_sets(columns, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = parse(None, [*columns, "--model_name_or_path", "minilm", "--seed", "3"])
    assert (job.name, job.training.output_dir) == ("reviews-minilm", "runs/reviews-minilm")
    assert (job.training.learning_rate, job.training.num_train_epochs, job.training.seed) == (5e-5, 3, 3)
    assert job.command.startswith("python -m hf_trim.run --dataset ")
    scratch = parse(None, ["--dataset", ".", "--timm_model", "test_vit"])
    assert scratch.name == f"{tmp_path.name}-test_vit" and scratch.training.learning_rate == 1e-3
    assert parse(None, ["--dataset=digits", "--model_type=vit"]).name == "digits-vit"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compare", "digits-vit"], "the recipe comes first; without one, give --dataset and a model"),
        (["--model_type", "vit"], "without one, give --dataset"),
        (["--dataset", "digits"], "No model is given: give exactly one of model_name_or_path, model_type, timm_model"),
        (["--dataset", "digits", "--model_type", "vit", "--lr", "1"], "unknown argument '--lr'."),
    ],
)
def test_what_is_missing_without_a_recipe_is_said(options, message, capsys, tmp_path):
    assert main([*options, "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_shows_all_and_leaves_nothing(columns, tmp_path):
    folder = tmp_path / "data"
    DatasetDict(train=tiny_digits(40, size=8)).save_to_disk(folder)
    before = sorted(tmp_path.rglob("*"))
    options = [*columns, *BERT, "--output_dir", tmp_path / "out", "--dry_run", "--trim_keep_end", "0.4"]
    status, output = Forked("hf_trim", "run", *options, "--num_train_epochs", "3", "--compare").finish()
    assert status == 0, output
    for text in (
        "48 rows to train on, 12 to test on", "3 classes", "Model: BertForSequenceClassification",
        "p in each epoch: 1, 0.7, 0.4", "Steps: 6 of 32 samples (3 epochs)", "Time: about ", "and 4 tests of ",
        "plain, trimmed, adaptive, random, 3 seeds each: 12 runs, about ", "Nothing was trained",
    ):  # fmt: skip
        assert text in output
    assert len(re.findall(r"  1: good and fine \d+\n|  2: bad or poor \d+\n|  3: so so \d+\n", output)) == 3
    assert "'loss'" not in output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        (["--trim_select", "none"], "nothing is trimmed"),
        (["--trim_schedule", "adaptive", "--trim_mass", "0.9"], "carry 90 % of the gradient mass"),
        (["--max_steps", "7"], "p falls from 1 to 0.2 over 7 steps"),
        (["--trim_skip_hardest", "0.3"], "but for the hardest 30 % of each mini-batch; p in each epoch: 0.7, "),
        (["--num_train_epochs", "12"], "p in each epoch: 1, 0.927, 0.855, …, 0.273, 0.2"),
    ],
)
def test_a_dry_run_of_a_recipe(options, schedule, recipe, tmp_path, capsys):
    assert main([recipe, "--dry_run", "--output_dir", str(tmp_path / "out"), *options]) == 0
    printed = capsys.readouterr().out
    assert schedule in printed and "8 × 8 pixels" in printed
    assert not (tmp_path / "out").exists()


def test_print_config_is_a_recipe_that_runs_as_this_one(recipe, tmp_path, capsys):
    options = ["--trim_keep_end", "0.4", "--learning_rate", "1e-5", "--seed", "7", "--hub_token", "hf_secret",
               "--output_dir", str(tmp_path / "out")]  # fmt: skip
    assert main([recipe, *options, "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "hf_secret" not in printed and "trim_schedule: epoch" in printed
    assert list(yaml.safe_load(printed)) == ["model", "data", "training"]
    (tmp_path / "tiny2.yaml").write_text(printed)
    asked, printed_job = parse(recipe, options), parse(str(tmp_path / "tiny2.yaml"), [])
    assert (asked.model, asked.data, asked.run) == (printed_job.model, printed_job.data, printed_job.run)
    assert {**asked.training.to_dict(), "hub_token": None} == {**printed_job.training.to_dict(), "hub_token": None}
    assert not (tmp_path / "out").exists()


def test_init_writes_a_recipe_that_runs(reviews, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my.yaml"
    status, output = Forked("hf_trim", "init", path, "--dataset", reviews).finish()
    assert status == 0 and output.startswith("Note: label_column is not given, and 'score' is taken")
    assert output.endswith(f"Written to {path}. Look into it, then: hf-trim run {path}\n")
    written = path.read_text()
    assert "# Data: " in written and "3 classes to train on: 1 (16)" in written
    assert max(map(len, written.splitlines()[1:])) < 120
    assert "# adaptive: p follows the losses; epoch or step: from trim_keep_start to trim_keep_end\n" in written
    _, fields = read_recipe(str(path))
    assert (fields["text_column"], fields["label_column"]) == ("review", "score")
    assert (fields["model_name_or_path"], fields["trim_schedule"], fields["trim_mass"]) == ("minilm", "adaptive", 0.95)
    assert "trim_keep_end" not in fields
    for line in written.splitlines():
        if ": " in line and not line.lstrip().startswith("#"):
            assert "  # " in line  # each field has a comment
    job = parse(str(path), [])
    assert (job.name, job.training.output_dir, job.training.learning_rate) == ("my", "runs/my", 5e-5)
    # What is commented out can be taken in.
    path.write_text(written.replace("  # early_stopping_patience", "  early_stopping_patience"))
    assert parse(str(path), []).run.early_stopping_patience == 2
    assert init.main([str(path), "--dataset", str(reviews), "--label_column", "score"]) == 2
    assert f"{path} exists: choose another name" in capsys.readouterr().err


def test_init_for_pictures_has_a_model_of_their_size(tmp_path, capsys):
    folder = write_pictures(tmp_path / "pictures", 40, size=16)
    path = tmp_path / "pictures.yaml"
    assert init.main([str(path), "--dataset", str(folder)]) == 0
    _, fields = read_recipe(str(path))
    assert (fields["image_size"], fields["config_overrides"]["patch_size"]) == (16, 2)
    assert main([str(path), "--dry_run"]) == 0
    assert "Model: ViTForImageClassification" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["my.txt", "--dataset", "digits"], "needs the ending .yaml, and is 'my.txt'"),
        (["my.yaml"], "give --dataset: a CSV or Parquet file"),
        (["my.yaml", "--dataset", "digit"], "Did you mean 'digits'?"),
        (["--dataset", "digits"], "the file comes first, and '--dataset' is none"),
        (["no/such/my.yaml", "--dataset", "digits"], "there is no folder no/such"),
        (["/proc/my.yaml", "--dataset", "digits"], "/proc/my.yaml cannot be written: "),
    ],
)
def test_wrong_input_to_init(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert init.main(arguments) == 2
    assert message in capsys.readouterr().err and not os.listdir(tmp_path)


def test_a_map_of_columns(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    recipe = {"model": TINY["model"], "data": {"dataset": "digits", "columns": {"label": "score", "text": "review"}}}
    path.write_text(yaml.safe_dump(recipe))
    job = parse(str(path), [])
    assert (job.data.text_column, job.data.label_column) == ("review", "score")
    for columns, message in (
        ({"words": "review"}, "'columns' must map image, text, label to names of columns"),
        ("review", "and is 'review'"),
    ):
        path.write_text(yaml.safe_dump({**recipe, "data": {"columns": columns}}))
        assert main([str(path)]) == 2
        assert message in capsys.readouterr().err
    recipe["data"]["text_column"] = "body"
    path.write_text(yaml.safe_dump(recipe))
    assert main([str(path)]) == 2
    assert "the field 'text_column' stands there twice" in capsys.readouterr().err


def test_a_comparison_of_a_folder_of_pictures(tmp_path, no_plots):
    """File names with the words by which `datasets` makes splits: all pictures are trained on."""
    folder = write_pictures(tmp_path / "pictures", 40, size=8, names=["a test of {}", "train-{}", "val_{}", "{}"])
    options = ["--dataset", folder, "--model_type", "vit", "--config_overrides",
               json.dumps(TINY["model"]["config_overrides"]), "--use_cpu", "--num_train_epochs", "1",
               "--test_fraction", "0.4", "--compare", "--seeds", "1", "--arms", "plain",
               "--output_dir", tmp_path / "out"]  # fmt: skip
    status, output = Forked("hf_trim", "run", *options).finish()
    assert status == 0, output
    assert "24 rows to train on, 16 to test on" in output and "4 classes to train on: class 0 (6)" in output
