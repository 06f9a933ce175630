"""One training: what it saves, the paper's protocol, checkpoints, language models."""

import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from hf_trim.run.__main__ import main
from hf_trim.run.arms import CHANGES
from hf_trim.run.clock import train_seconds
from hf_trim.run.recipe import parse
from hf_trim.run.trainer import load_job_data, make_trainer
from hf_trim.trainer.checkpoints import last_complete_checkpoint
from tests.run.test_models import save_like_the_hub


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


def test_paper_recipes_have_the_papers_protocol():
    for data in ("svhn", "cifar10", "cifar100"):
        for model in ("resnet34", "densenet121"):
            _, run, model_args, _, training, *_ = parse(f"{data}-{model}", [])
            assert model_args.timm_model == model
            assert (run.l2_weight_decay, run.lr_milestones, run.lr_gamma) == (1e-4, [50, 100], 0.5)
            assert (training.num_train_epochs, training.per_device_train_batch_size) == (150, 128)
            assert (training.learning_rate, training.trim_schedule) == (1e-3, "epoch")
            assert (training.trim_keep_start, training.trim_keep_end) == (1.0, 0.2)


def test_arms_of_a_seed_start_from_the_same_weights(recipe):
    job = parse(recipe, ["--output_dir", "unused"])
    data = load_job_data(job)
    weights = {
        (arm, seed): torch.cat(
            [p.flatten() for p in make_trainer(job, data, CHANGES[arm], seed, "unused").model.parameters()]
        )
        for arm, seed in (("plain", 1), ("trimmed", 1), ("random", 1), ("plain", 2))
    }
    assert torch.equal(weights["plain", 1], weights["trimmed", 1])
    assert torch.equal(weights["plain", 1], weights["random", 1])
    assert not torch.equal(weights["plain", 1], weights["plain", 2])


def test_optimizer_and_learning_rate_of_the_paper(recipe, tmp_path):
    options = ["--l2_weight_decay", "0.0001", "--lr_milestones", "1", "2", "--output_dir", str(tmp_path)]
    job = parse(recipe, options)
    trainer = make_trainer(job, load_job_data(job), {"trim_select": "none"}, 0, tmp_path)
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


def test_a_trained_language_model_loads_back(small_gpt2, tmp_path, no_plots):
    out = tmp_path / "out"
    options = [*small_gpt2, "--max_train_samples", "32"]
    assert main([*options, "--output_dir", str(out)]) == 0
    results = json.loads((out / "all_results.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    data = load_job_data(parse(options[0], options[1:])).test_dataset.with_format("torch")
    with torch.no_grad():
        logits = model(data["input_ids"][:]).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data["labels"][:][:, 1:].flatten())
    assert results["eval_perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)


LARGE = ("svhn-resnet34", "cifar10-densenet121", "cifar100-resnet34")


@pytest.mark.parametrize(
    "name",
    ["cifar10-vit", *[pytest.param(name, marks=pytest.mark.extended) for name in LARGE]],
)
def test_paper_recipes_run_end_to_end_on_data_of_the_hubs_schema(name, tmp_path, no_plots):
    path = tmp_path / "data"
    job = parse(name, [])
    save_like_the_hub(job.data.dataset, path)
    # Two epochs, so that p falls. The models are large, and checkpoints are tested elsewhere.
    options = ["--dataset", str(path), "--num_train_epochs", "2", "--output_dir", str(tmp_path / "out"), "--use_cpu",
               "--save_strategy", "no"]  # fmt: skip
    if job.model.config_overrides:
        options += ["--config_overrides", json.dumps({**job.model.config_overrides, "num_hidden_layers": 1})]
    assert main([name, *options]) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    fractions = [log["keep_fraction"] for log in state["log_history"] if "keep_fraction" in log]
    assert fractions == pytest.approx([1.0, 0.2])
    assert "eval_error" in json.loads((tmp_path / "out" / "all_results.json").read_text())
