"""The output folder: what a failed start leaves, which settings are other ones, and `--overwrite`."""

import json

import pytest
import yaml
from filelock import FileLock

from hf_trim.run.__main__ import main
from tests.support.recipes import TINY


@pytest.fixture(autouse=True)
def quick(no_plots):
    """No test looks at plots."""


@pytest.fixture
def short(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "training": {**TINY["training"], "num_train_epochs": 1}}))
    return [str(path), "--output_dir", str(tmp_path / "out")]


WRONG = [["--label_column", "lable"], ["--trim_unit", "token"], ["--config_overrides", '{"hiden_size": 1}']]


@pytest.mark.parametrize("wrong", [*WRONG, [*WRONG[0], "--compare"]])
def test_a_failed_start_leaves_nothing(wrong, short, tmp_path, capsys):
    assert main([*short[:-1], str(tmp_path / "new" / "out"), *wrong]) == 2
    assert not (tmp_path / "new").exists()


def test_a_training_that_failed_in_its_first_step_blocks_nothing(short, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text('{"label_column": "lable"}')
    assert main([*short, "--compare", "--seeds", "1", "--arms", "plain"]) == 0
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["dataset"] == "digits" and "label_column" not in settings


def test_other_settings_are_refused_with_a_way_out(short, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(short) == 0
    capsys.readouterr()
    # A value that is the default is the same as none.
    assert main([*short, "--trim_keep_end", "0.2", "--seed", "42", "--label_noise", "0"]) == 0
    assert "Finished before: test error" in capsys.readouterr().out
    assert main([*short, "--compare"]) == 2
    assert f"whose model a comparison would replace: add --output_dir {out}_compared" in capsys.readouterr().err
    (out / "all_results.json").unlink()  # interrupted: it must not be finished with another seed or selection
    for options, changes, folder in (
        (["--trim_keep_end", "0.5"], "trim_keep_end was 0.2 and is 0.5", "trim_keep_end-0.5"),
        (["--seed", "7"], "seed was 42 and is 7", "seed-7"),
        (["--trim_select", "none"], "trim_select was 'hardest' and is 'none'", "trim_select-none"),
    ):
        assert main([*short, *options]) == 2
        error = capsys.readouterr().err
        assert f"holds runs with other settings ({changes}): add --output_dir {out}_{folder} to keep both" in error
        assert "or add --overwrite to replace what is there" in error
    # A comparison has runs of several seeds; then the folder holds the trimmed model of the first one.
    assert main([*short, "--compare", "--seeds", "1", "--arms", "plain", "trimmed", "--seed", "7"]) == 0
    assert main([*short, "--seed", "7"]) == 0
    assert main(short) == 2 and "seed was 7 and is 42" in capsys.readouterr().err


def test_overwriting_replaces_what_is_there_and_nothing_else(short, tmp_path, capsys):
    out = tmp_path / "out"
    compare = ["--compare", "--seeds", "1", "--arms", "plain", "trimmed"]
    assert main([*short, *compare]) == 0
    (out / "notes.txt").write_text("mine")
    before = (out / "records" / "plain-seed42.json").read_bytes()
    # What cannot start deletes nothing, and neither does what another process would lose.
    assert main([*short, "--overwrite", "--label_column", "lable"]) == 2
    with FileLock(out / "records" / "plain-seed42.json.lock"):
        assert main([*short, "--overwrite", "--trim_keep_end", "0.5", *compare]) == 2
    assert "another process trains in" in capsys.readouterr().err
    assert (out / "records" / "plain-seed42.json").read_bytes() == before
    assert main([*short, "--overwrite", "--trim_keep_end", "0.5", *compare]) == 0
    settings = json.loads((out / "records" / "trimmed-seed42.json").read_text())["settings"]
    assert settings["trim_keep_end"] == 0.5 and (out / "notes.txt").read_text() == "mine"
    assert main([*short, "--overwrite"]) == 0
    assert not (out / "records").exists() and "keep_end" not in (out / "settings.json").read_text()
    assert main([*short, "--overwrite", "--push_only"]) == 2
    assert "--overwrite deletes what --push_only would push" in capsys.readouterr().err
