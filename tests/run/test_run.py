"""`python -m hf_trim.run`: recipes, the command line, a comparison that is killed and goes on, the report."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from hf_trim.files import write_json
from hf_trim.report.__main__ import table_rows
from hf_trim.run.__main__ import main
from hf_trim.run.clock import train_seconds
from hf_trim.run.compare import ARMS
from hf_trim.run.grid import expand
from hf_trim.run.recipe import parse, recipe_names
from hf_trim.run.records import read_record
from hf_trim.run.trainer import load_job_data, make_trainer
from hf_trim.trainer.checkpoints import last_complete_checkpoint
from tests.run.test_models import save_like_the_hub
from tests.support.helpers import record


TINY = {
    "model": {
        "model_type": "vit",
        "config_overrides": {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
            "patch_size": 4,
        },
    },
    "data": {"dataset": "digits", "image_channels": 1, "max_train_samples": 160, "max_test_samples": 60},
    "training": {
        "num_train_epochs": 3, "per_device_train_batch_size": 16, "learning_rate": 0.01, "eval_strategy": "epoch",
        "save_strategy": "epoch", "logging_strategy": "epoch", "save_total_limit": 2, "use_cpu": True,
        "dataloader_num_workers": 0,
    },
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return str(path)


def test_command_line_overrides_the_recipe(recipe):
    name, run, model, data, training, settings, command = parse(
        recipe, ["--num_train_epochs", "5", "--trim-keep-end", "0.4", "--compare", "--seeds", "2"]
    )
    assert (name, run.compare, run.seeds, data.dataset) == ("tiny", True, 2, "digits")
    assert (training.num_train_epochs, training.trim_keep_end, training.learning_rate) == (5, 0.4, 0.01)
    assert training.output_dir == "runs/tiny"
    assert model.config_overrides["patch_size"] == 4
    assert settings["num_train_epochs"] == 5 and settings["trim_keep_end"] == 0.4 and "seeds" not in settings
    assert command == "python -m hf_trim.run tiny.yaml --compare --num_train_epochs 5.0 --seeds 2 --trim_keep_end 0.4"
    *_, settings, command = parse(recipe, ["--hub_token", "hf_secret", "--output_dir", "/some/where"])
    assert "hf_secret" not in json.dumps(settings) + command and command == "python -m hf_trim.run tiny.yaml"


@pytest.mark.parametrize("name", recipe_names())
def test_each_recipe_parses_and_is_listed(name, capsys):
    job = parse(name, [])
    assert job.model.source() and job.data.dataset and job.run.expected_time != "unknown"
    assert job.training.save_strategy == job.training.eval_strategy == "epoch"
    assert main(["--list"]) == 0
    assert name in capsys.readouterr().out


def test_paper_recipes_have_the_papers_protocol():
    for data in ("svhn", "cifar10", "cifar100"):
        for model in ("resnet34", "densenet121"):
            _, run, model_args, _, training, *_ = parse(f"{data}-{model}", [])
            assert model_args.timm_model == model
            assert (run.l2_weight_decay, run.lr_milestones, run.lr_gamma) == (1e-4, [50, 100], 0.5)
            assert (training.num_train_epochs, training.per_device_train_batch_size) == (150, 128)
            assert (training.learning_rate, training.trim_schedule) == (1e-3, "epoch")
            assert (training.trim_keep_start, training.trim_keep_end) == (1.0, 0.2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["digits-vti"], "Did you mean 'digits-vit'?"),
        (["no/such.yaml"], "there is no file"),
        (["--compare", "digits-vit"], "the recipe comes first"),
        (["RECIPE", "--num_trian_epochs", "3"], "'--num_trian_epochs'. Did you mean '--num_train_epochs'"),
        (["RECIPE", "--trim_select", "hardst"], "Did you mean 'hardest'?"),
        (["RECIPE", "--trim_keep_end", "much"], "--trim_keep_end/--trim-keep-end: invalid float value: 'much'"),
        (["RECIPE", "--trim_keep_end", "2"], "trim_keep_end must be a fraction"),
        (["RECIPE", "--eval_strategy", "epochs"], "Did you mean 'epoch'?"),
        (["RECIPE", "--seeds", "0"], "seeds must be at least 1"),
        (["RECIPE", "--lr_milestones", "5", "3"], "lr_milestones must be rising"),
        (["RECIPE", "--dataset", "digit"], "Did you mean 'digits'?"),
        (["RECIPE", "--model_type", "vitt"], "Did you mean 'vit'?"),
        (["RECIPE", "--label_column", "digit"], "label_column"),
        (["RECIPE", "--trim_unit", "token"], "needs a loss per token"),
    ],
)  # fmt: skip
def test_wrong_input_ends_in_one_message(arguments, message, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([recipe if each == "RECIPE" else each for each in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    "change, message",
    [
        ({"trainig": {}}, "unknown field 'trainig'. Did you mean"),
        ({"training": {"learning_rat": 1}}, "unknown field 'learning_rat'. Did you mean 'learning_rate'?"),
        ({"training": {"learning_rate": "fast"}}, "--learning_rate/--learning-rate: invalid float value: 'fast'"),
        ({"training": 3}, "the group 'training' must hold fields"),
        ({"dataset": "digits"}, "'dataset' stands there twice"),
        ({"recipes": "digits-vit"}, "'recipes' must be a list of recipes, and is 'digits-vit'"),
        ({"recipes": ["digits-vit"], "vary": {"seed": 1}}, "'vary' must give each field a list of values"),
        ({"recipes": ["digits-vti"]}, "Did you mean 'digits-vit'?"),
    ],
)
def test_wrong_recipes_end_in_one_message(change, message, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**TINY, **change}))
    assert main([str(path)]) == 2
    assert message in capsys.readouterr().err
    path.write_text("model: [")
    assert main([str(path)]) == 2
    assert "is not valid YAML" in capsys.readouterr().err


def test_no_traceback_and_exit_status_2_from_the_shell():
    done = subprocess.run([sys.executable, "-m", "hf_trim.run", "digits-vti"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("hf_trim.run: there is no recipe 'digits-vti'. Did you mean 'digits-vit'?")
    assert "Traceback" not in done.stderr


def test_training_saves_what_the_examples_save_and_is_not_repeated(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [recipe, "--output_dir", str(out), "--seed", "7"]
    assert main(arguments) == 0
    results = json.loads((out / "all_results.json").read_text())
    assert {"eval_error", "eval_accuracy", "eval_loss", "train_loss", "train_runtime", "train_seconds"} <= set(results)
    assert {"train_results.json", "eval_results.json", "trainer_state.json", "config.json"} <= set(os.listdir(out))
    state = json.loads((out / "trainer_state.json").read_text())
    fractions = [log["keep_fraction"] for log in state["log_history"] if "keep_fraction" in log]
    assert fractions == pytest.approx([1.0, 0.6, 0.2])
    assert train_seconds(state["log_history"]) == pytest.approx(results["train_seconds"])
    model = AutoModelForImageClassification.from_pretrained(out)
    assert model.config.id2label[9] == "9"

    written = (out / "all_results.json").stat().st_mtime_ns
    assert main(arguments) == 0
    assert "Finished before" in capsys.readouterr().out
    assert (out / "all_results.json").stat().st_mtime_ns == written
    assert main([*arguments, "--trim_keep_end", "0.5"]) == 2
    assert "other settings (trim_keep_end was 'not set' and is 0.5)" in capsys.readouterr().err


def table_of(folder):
    records = [read_record(path) for path in sorted((folder / "records").glob("*.json"))]
    rows = table_rows(records)[1]
    curves = {(r["arm"], r["seed"]): [h.get("test_error") for h in r["history"]] for r in records}
    return [row[:5] for row in rows], curves


def test_a_killed_comparison_goes_on_and_gives_the_same_table(recipe, tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = [recipe, "--compare", "--seeds", "1", "--num_train_epochs", "6", "--output_dir"]
    assert main([*options, str(whole)]) == 0
    printed = capsys.readouterr().out
    assert "[3/3] tiny: random, seed 42: test error" in printed
    assert (whole / "comparison.png").stat().st_size > 10_000
    assert not list(whole.glob("*-seed*"))  # checkpoints of finished runs

    process = subprocess.Popen([sys.executable, "-m", "hf_trim.run", *options, str(killed)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    # In the middle of the second run: the first has its record, the second a checkpoint.
    while not list(killed.glob("trimmed-seed42/checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = killed / "records" / "plain-seed42.json"
    written = first.stat().st_mtime_ns
    assert not (killed / "records" / "trimmed-seed42.json").exists()

    assert main([*options, str(killed)]) == 0
    assert first.stat().st_mtime_ns == written
    assert table_of(killed) == table_of(whole)
    # The record holds the epochs before the kill as well.
    assert len(read_record(killed / "records" / "trimmed-seed42.json")["history"]) == 6


@pytest.fixture
def grid(recipe, tmp_path):
    path = tmp_path / "grid.yaml"
    vary = {"label_noise": [None, 0.5], "trim_schedule": ["epoch", "step"]}
    path.write_text(yaml.safe_dump({"recipes": [recipe], "num_train_epochs": 1, "seeds": 1, "vary": vary}))
    return str(path)


def records_of(folder):
    return {f"{path.parts[-3]} {path.stem}": read_record(path) for path in folder.glob("*/records/*.json")}


def test_a_grid_compares_its_recipes_with_each_setting(grid, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([grid, "--output_dir", str(out), "--max_train_samples", "64"]) == 0
    names = ["tiny_trim_schedule-epoch", "tiny_trim_schedule-step", "tiny_label_noise-0.5_trim_schedule-epoch",
             "tiny_label_noise-0.5_trim_schedule-step"]  # fmt: skip
    records = records_of(out)
    assert set(records) == {f"{name} {arm}-seed42" for name in names for arm in ARMS}
    noisy = records[f"{names[3]} random-seed42"]["settings"]
    assert (noisy["label_noise"], noisy["trim_schedule"], noisy["max_train_samples"]) == (0.5, "step", 64)
    assert "label_noise" not in records[f"{names[1]} random-seed42"]["settings"]
    assert all(record["input_samples_per_second"] > record["train_samples_per_second"] for record in records.values())
    capsys.readouterr()
    # Another process trains one of the runs: all others are finished and stay.
    missing = out / names[0] / "records" / "plain-seed42.json"
    content = missing.read_text()
    missing.unlink()
    with FileLock(f"{missing}.lock"):
        assert main([grid, "--output_dir", str(out), "--max_train_samples", "64"]) == 0
    printed = capsys.readouterr().out
    assert "tiny: plain, seed 42: another process trains it" in printed and not missing.exists()
    missing.write_text(content)
    report = (out / "report" / "report.md").read_text()
    assert "| tiny, label_noise 0.5, trim_schedule step | 1 |" in report and "input alone" in report


def test_processes_of_a_launcher_share_the_runs_of_a_grid(grid, tmp_path):
    out = tmp_path / "out"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "hf_trim.run", grid, "--output_dir", str(out), "--max_train_samples", "64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(records_of(out)) == 12
    # Each run was trained once, by one process alone.
    assert len(re.findall(r"(?m)^\[./3\] tiny: \w+, seed 42$", done.stdout)) == 12
    assert "another process trains it" in done.stdout


def test_grids_of_the_package_parse():
    assert recipe_names("grids") == ["digits-ablation", "table1"]
    folder, comparisons = expand("table1", ["--seeds", "10"])
    assert folder == "runs/table1" and [recipe for recipe, _ in comparisons] == [
        f"{data}-{model}" for data in ("svhn", "cifar10", "cifar100") for model in ("resnet34", "densenet121")
    ]
    for recipe, options in comparisons + expand("digits-ablation", [])[1]:
        _, run, *_ = parse(recipe, options)
        assert run.compare and run.seeds == (3 if recipe == "digits-vit" else 10)
    assert len(expand("digits-ablation", [])[1]) == 16


def test_arms_of_a_seed_start_from_the_same_weights(recipe):
    job = parse(recipe, ["--output_dir", "unused"])
    data = load_job_data(job)
    weights = {
        (arm, seed): torch.cat(
            [p.flatten() for p in make_trainer(job, data, ARMS[arm], seed, "unused").model.parameters()]
        )
        for arm, seed in (("plain", 1), ("trimmed", 1), ("random", 1), ("plain", 2))
    }
    assert torch.equal(weights["plain", 1], weights["trimmed", 1])
    assert torch.equal(weights["plain", 1], weights["random", 1])
    assert not torch.equal(weights["plain", 1], weights["plain", 2])


def test_optimizer_and_learning_rate_of_the_paper(recipe, tmp_path):
    options = ["--l2_weight_decay", "0.0001", "--lr_milestones", "1", "2", "--output_dir", str(tmp_path)]
    job = parse(recipe, options)
    trainer = make_trainer(job, load_job_data(job), "none", 0, tmp_path)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is torch.optim.Adam
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [1e-4]
    assert len(trainer.optimizer.param_groups[0]["params"]) == len(list(trainer.model.parameters()))
    rates = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    assert rates == pytest.approx([0.01, 0.005, 0.0025])


def test_cut_off_checkpoints_are_passed_over(tmp_path, caplog):
    assert last_complete_checkpoint(tmp_path) is None
    for step, state in ((5, '{"global_step": 5}'), (10, '{"global_step": 10}'), (15, '{"glob'), (20, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert "checkpoint-15 is not complete" in caplog.text


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


def test_language_models_are_compared_by_perplexity(tmp_path, capsys):
    options = ["--compare", "--seeds", "1", "--max_train_samples", "48", "--max_test_samples", "8", "--use_cpu",
               "--max_seq_length", "32", "--output_dir", str(tmp_path / "out"), "--num_train_epochs", "1"]  # fmt: skip
    assert main(["bbc-gpt2", *options]) == 0
    printed = capsys.readouterr().out
    assert "bbc-gpt2: trimmed, seed 42: test perplexity" in printed and "test perplexity" in printed.split("┃")[3]
    records = {arm: read_record(tmp_path / "out" / "records" / f"{arm}-seed42.json") for arm in ARMS}
    assert all(record["metric"] == "perplexity" for record in records.values())
    assert len({record["test_perplexity"] for record in records.values()}) == 3
    assert all(1000 < record["test_perplexity"] < 50_000 for record in records.values())


def test_a_trained_language_model_loads_back(tmp_path):
    out = tmp_path / "out"
    options = ["--max_train_samples", "32", "--max_test_samples", "8", "--max_seq_length", "32", "--use_cpu"]
    assert main(["bbc-gpt2", *options, "--num_train_epochs", "1", "--output_dir", str(out)]) == 0
    results = json.loads((out / "all_results.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    data = load_job_data(parse("bbc-gpt2", options)).test_dataset.with_format("torch")
    with torch.no_grad():
        logits = model(data["input_ids"][:]).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data["labels"][:][:, 1:].flatten())
    assert results["eval_perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["svhn-resnet34", "cifar10-densenet121", "cifar100-resnet34", "cifar10-vit"])
def test_paper_recipes_run_end_to_end_on_data_of_the_hubs_schema(name, tmp_path):
    path = tmp_path / "data"
    save_like_the_hub(parse(name, []).data.dataset, path)
    # Two epochs, so that p falls; the configuration's name means nothing to data on disk.
    options = ["--dataset", str(path), "--num_train_epochs", "2", "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    assert main([name, *options]) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    fractions = [log["keep_fraction"] for log in state["log_history"] if "keep_fraction" in log]
    assert fractions == pytest.approx([1.0, 0.2])
    assert "eval_error" in json.loads((tmp_path / "out" / "all_results.json").read_text())
