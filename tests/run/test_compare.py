"""Comparisons and grids: killed ones go on, processes share their runs, and what the records hold."""

import re
import signal
import subprocess
import sys

import pytest
import yaml
from filelock import FileLock

from hf_trim.files import write_json
from hf_trim.report import table_rows
from hf_trim.run.__main__ import main
from hf_trim.run.compare import print_missing
from hf_trim.run.grid import expand
from hf_trim.run.recipe import parse, recipe_names
from hf_trim.run.records import DEFAULT_ARMS as ARMS
from hf_trim.run.records import read_record, used_hardware
from tests.support.forked import Forked
from tests.support.helpers import record


def table_of(folder):
    records = [read_record(path) for path in sorted((folder / "records").glob("*.json"))]
    rows = table_rows(records)[1]
    curves = {(r["arm"], r["seed"]): [h.get("test_error") for h in r["history"]] for r in records}
    return [row[:5] for row in rows], curves


@pytest.mark.extended
def test_a_killed_comparison_goes_on_and_gives_the_same_table(recipe, tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = [recipe, "--compare", "--seeds", "1", "--arms", "plain", "trimmed", "--output_dir"]
    assert main([*options, str(whole)]) == 0
    printed = capsys.readouterr().out
    assert "[2/2] trimmed, seed 42: test error" in printed
    assert (whole / "comparison.png").stat().st_size > 10_000
    assert not [*whole.glob("*-seed*"), *whole.rglob("*.lock")]  # checkpoints and locks of finished runs

    # In the middle of the second run: the first has its record, the second a checkpoint.
    assert Forked("hf_trim.run", *options, killed, kill=("step", 6)).finish()[0] == -signal.SIGKILL
    assert [path.name for path in killed.glob("trimmed-seed42/checkpoint-*")] == ["checkpoint-4"]
    first = killed / "records" / "plain-seed42.json"
    written = first.stat().st_mtime_ns
    assert not (killed / "records" / "trimmed-seed42.json").exists()

    assert main([*options, str(killed)]) == 0
    assert first.stat().st_mtime_ns == written
    assert table_of(killed) == table_of(whole)
    # The record holds the epochs before the kill as well.
    assert len(read_record(killed / "records" / "trimmed-seed42.json")["history"]) == 3


@pytest.fixture
def grid(recipe, tmp_path):
    path = tmp_path / "grid.yaml"
    vary = {"label_noise": [None, 0.5], "trim_schedule": ["step"]}
    path.write_text(yaml.safe_dump({"recipes": [recipe], "num_train_epochs": 1, "seeds": 1, "vary": vary}))
    return str(path)


def records_of(folder):
    return {f"{path.parts[-3]} {path.stem}": read_record(path) for path in folder.glob("*/records/*.json")}


def test_a_grid_compares_its_recipes_with_each_setting(grid, tmp_path, capsys, no_plots):
    out = tmp_path / "out"
    assert main([grid, "--output_dir", str(out), "--max_train_samples", "48"]) == 0
    names = ["tiny_trim_schedule-step", "tiny_label_noise-0.5_trim_schedule-step"]
    records = records_of(out)
    assert set(records) == {f"{name} {arm}-seed42" for name in names for arm in ARMS}
    noisy = records[f"{names[1]} random-seed42"]["settings"]
    assert (noisy["label_noise"], noisy["trim_schedule"], noisy["max_train_samples"]) == (0.5, "step", 48)
    assert "label_noise" not in records[f"{names[0]} random-seed42"]["settings"]
    assert all(r["input_samples_per_second"] > r["train_samples_per_second"] for r in records.values())
    assert {r["hardware"] for r in records.values()} == {used_hardware()}
    assert f"; {used_hardware()}." in (out / names[0] / "README.md").read_text()
    capsys.readouterr()
    # Another process trains one of the runs: all others are finished and stay.
    missing = out / names[0] / "records" / "plain-seed42.json"
    content = missing.read_text()
    missing.unlink()
    with FileLock(f"{missing}.lock"):
        assert main([grid, "--output_dir", str(out), "--max_train_samples", "48"]) == 0
    printed = capsys.readouterr().out
    assert "] plain, seed 42: another process trains it" in printed and not missing.exists()
    assert printed.count("Another process still trains 1 run: plain, seed 42: the table is without it.\n") == 1
    last = f"Another process still trains 1 run: plain, seed 42, of {names[0]}: the report is without it.\n"
    assert printed.endswith(last)
    # A damaged file of the second comparison is found before the first one is trained.
    for name in ("records/trimmed-seed42.json", "run.json"):
        damaged = out / names[1] / name
        whole = damaged.read_text()
        damaged.write_text(whole[: len(whole) // 2])
        assert main([grid, "--output_dir", str(out), "--max_train_samples", "48"]) == 2
        assert f"hf-trim: {damaged} is " in capsys.readouterr().err and not missing.exists()
        damaged.write_text(whole)
    missing.write_text(content)
    report = (out / "report" / "report.md").read_text()
    assert "| tiny, label_noise 0.5 | 1 |" in report and "input alone" in report


def test_runs_that_another_process_trains_or_has_left_are_named(recipe, tmp_path, capsys):
    path, records = tmp_path / "grid.yaml", tmp_path / "out" / "tiny" / "records"
    path.write_text(yaml.safe_dump({"recipes": [recipe], "seeds": 1, "arms": ["plain", "trimmed", "short"]}))
    records.mkdir(parents=True)
    with FileLock(records / "plain-seed42.json.lock"), FileLock(records / "trimmed-seed42.json.lock"):
        assert main([str(path), "--output_dir", str(tmp_path / "out")]) == 0  # nothing to show yet
    runs = "3 runs: plain, seed 42; trimmed, seed 42; short, seed 42: the"
    assert f"Another process still trains {runs} report is without them.\n" in capsys.readouterr().out
    print_missing([parse(recipe, ["--compare", "--seeds", "1", "--output_dir", str(records.parent)])], "table")
    said = capsys.readouterr().out
    assert said.startswith("Start the same command again: another process left out 4 runs: plain, seed 42; trimmed")


@pytest.mark.extended
def test_processes_of_a_launcher_share_the_runs_of_a_grid(grid, tmp_path):
    out = tmp_path / "out"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "hf_trim.run", grid, "--output_dir", str(out), "--max_train_samples", "48"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(records_of(out)) == 2 * len(ARMS)
    # Each run was trained once, by one process alone.
    ends = re.findall(rf"(?m)^\[./{len(ARMS)}\] \w+, seed 42: test error \S+ % \((.*)\)$", done.stdout)
    assert sum(end != "finished before" for end in ends) == 2 * len(ARMS)
    assert "another process trains it" in done.stdout


def test_a_grid_has_a_comparison_for_each_combination(recipe, tmp_path):
    path = tmp_path / "grid.yaml"
    vary = {"label_noise": [None, 0.5], "num_train_epochs": [1.0, 2.0]}
    path.write_text(yaml.safe_dump({"recipes": [recipe], "vary": vary}))
    folder, comparisons = expand(str(path), ["--output_dir", "out"])
    names = ["tiny_num_train_epochs-1", "tiny_num_train_epochs-2", "tiny_label_noise-0.5_num_train_epochs-1",
             "tiny_label_noise-0.5_num_train_epochs-2"]  # fmt: skip
    jobs = [parse(name, options) for name, options in comparisons]
    assert folder == "out" and [str(job.output_dir) for job in jobs] == [f"out/{name}" for name in names]
    assert [(job.data.label_noise, job.training.num_train_epochs) for job in jobs] == [
        (0, 1), (0, 2), (0.5, 1), (0.5, 2),
    ]  # fmt: skip
    assert all(job.run.compare for job in jobs)


def test_a_dry_run_of_a_grid_says_the_time_of_all(recipe, tmp_path, capsys):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({"recipes": [recipe], "seeds": 2, "vary": {"trim_keep_end": [0.2, 0.5]}}))
    assert main([str(path), "--dry_run", "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert all(printed.count(text) == 1 for text in ("Data: digits", "Model: ", "Steps: 12", "Time: about", "Nothing"))
    assert "p in each epoch: 1, 0.6, 0.2." in printed
    assert "p in each epoch: 1, 0.75, 0.5.\nAll 2 comparisons: 16 runs, about " in printed
    assert f"everything would go to {tmp_path / 'out'}." in printed and not (tmp_path / "out").exists()


def test_grids_of_the_package_parse():
    assert recipe_names("grids") == ["battery", "digits-ablation", "table1", "table1-small"]
    folder, comparisons = expand("table1", ["--seeds", "10"])
    assert folder == "runs/table1" and [recipe for recipe, _ in comparisons] == [
        f"{data}-{model}" for data in ("svhn", "cifar10", "cifar100") for model in ("resnet34", "densenet121")
    ]
    for recipe, options in comparisons + expand("digits-ablation", [])[1]:
        _, run, *_ = parse(recipe, options)
        assert run.compare and run.seeds == (3 if recipe == "digits-vit" else 10)
    assert len(expand("digits-ablation", [])[1]) == 16


@pytest.mark.extended
def test_language_models_are_compared_by_perplexity(small_gpt2, tmp_path, capsys, no_plots):
    options = [*small_gpt2, "--max_train_samples", "48", "--compare", "--seeds", "1", "--output_dir", tmp_path / "out"]
    options += ["--arms", "plain", "trimmed"]
    assert main([str(option) for option in options]) == 0
    printed = capsys.readouterr().out
    assert "] trimmed, seed 42: test perplexity" in printed and re.search(r"(?m)^arm +test perplexity", printed)
    records = {arm: read_record(tmp_path / "out" / "records" / f"{arm}-seed42.json") for arm in ("plain", "trimmed")}
    assert all(r["metric"] == "perplexity" for r in records.values())
    assert len({r["test_perplexity"] for r in records.values()}) == 2
    assert all(1000 < r["test_perplexity"] < 50_000 for r in records.values())


@pytest.mark.extended
def test_a_comparison_without_the_trimmed_arm_saves_the_model_of_another(recipe, tmp_path, capsys, no_plots):
    out = tmp_path / "out"
    options = [recipe, "--compare", "--num_train_epochs", "1", "--output_dir", str(out), "--arms", "plain"]
    assert main([*options, "adaptive", "--seeds", "1"]) == 0
    assert "The model there is that of adaptive, seed 42.\n" in capsys.readouterr().out
    assert "This model is that of the arm *adaptive* with seed 42." in (out / "README.md").read_text()
    assert (out / "model.safetensors").is_file()
    # It is not the recipe's own.
    assert main([recipe, "--num_train_epochs", "1", "--output_dir", str(out)]) == 2
    assert "arm was 'adaptive' and is 'trimmed'" in capsys.readouterr().err
    # More seeds: the data are described before what was finished.
    assert main([*options, "adaptive", "--seeds", "2"]) == 0
    assert capsys.readouterr().out.startswith("Data: digits")
    # The recipe's own model takes its place, and stays.
    assert main([*options, "trimmed", "--seeds", "1"]) == 0
    assert main([*options, "adaptive", "--seeds", "1"]) == 0
    assert "The model there is that of trimmed, seed 42.\n" in capsys.readouterr().out
    assert main([recipe, "--num_train_epochs", "1", "--output_dir", str(out)]) == 0
    assert capsys.readouterr().out.startswith("Finished before")


def test_records_are_written_whole(tmp_path):
    path = tmp_path / "records" / "a.json"
    assert read_record(path) is None
    write_json(path, record("plain", 1, 2.0))
    assert read_record(path)["test_error"] == 2.0
    with pytest.raises(TypeError):
        write_json(path, {"not": object()})
    assert read_record(path)["test_error"] == 2.0
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match="is no record of a finished run"):
        read_record(path)
