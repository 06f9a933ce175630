"""The model card says what is true, from the records, and leaves out what is not known."""

import json
import re

import pytest
import yaml

from hf_trim.hub.model_card import render_card
from hf_trim.run.__main__ import main
from tests.support.helpers import digits, tiny_vit, train
from tests.support.quick import measure_input_briefly
from tests.support.recipes import IMAGE, TIMM, TINY


@pytest.fixture(autouse=True, scope="module")
def brief_measurement():
    measure_input_briefly()


def write(folder, recipe, **training):
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**recipe, "training": {**recipe["training"], "num_train_epochs": 1, **training}}))
    return str(path)


def card_of(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    recipe = write(folder, TINY, num_train_epochs=2)
    arguments = [recipe, "--output_dir", str(folder / "out"), "--compare", "--arms", "plain", "trimmed", "--seeds"]
    assert main([*arguments, "2"]) == 0
    return folder / "out", arguments


def test_the_card_of_a_comparison_has_all_its_runs(compared):
    out, arguments = compared
    card = card_of(out)
    assert all(line in card for line in ("| plain | 2 |", "| trimmed | 2 |", "\n| 42 | ", "\n| 43 | "))
    assert "This model is that of the arm *trimmed* with seed 42. 2 seeds tell nothing certain" in card
    assert "[range]" in card and "95 % interval" not in card and "in 1 of 2 comparisons" in card
    # Another seed is in the card as well, though the model was trained before.
    assert main([*arguments, "3"]) == 0
    assert "| plain | 3 |" in card_of(out) and "\n| 44 | " in card_of(out)


def test_the_card_of_a_recipe_says_how_to_reproduce_it(compared):
    card = card_of(compared[0])
    (recipe,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    fields = {name: value for group in yaml.safe_load(recipe).values() for name, value in group.items()}
    assert fields == {**TINY["model"], **TINY["data"], **TINY["training"], "num_train_epochs": 2}
    assert "license" not in card and "trained from scratch on digits" in card
    assert "p fell from 1.0 to 0.2 by epoch, over 2 epochs." in card
    assert "Always the most frequent class has a test error of " in card


def test_a_model_of_a_local_folder_was_not_trained_from_scratch(compared, tmp_path):
    (tmp_path / "base").symlink_to(compared[0])
    recipe = write(tmp_path, {**TINY, "model": {"model_name_or_path": str(tmp_path / "base")}})
    assert main([recipe, "--max_steps", "3", "--output_dir", str(tmp_path / "out")]) == 0
    card = card_of(tmp_path / "out")
    assert "fine-tuned from the local model `base` on digits" in card and "base_model" not in card
    assert "p fell from 1.0 to 0.2 by step, over 3 steps." in card and "epochs." not in card


def test_a_local_timm_model_is_loaded_from_its_folder(tmp_path):
    assert main([write(tmp_path, TIMM), "--output_dir", str(tmp_path / "out")]) == 0
    assert "hf-hub:" not in card_of(tmp_path / "out")
    names = {}
    exec(re.findall(r"```python\n(import timm.*?)```", card_of(tmp_path / "out"), re.DOTALL)[0], names)
    assert names["model"].num_classes == 10
    assert "by step, over 4 steps." in card_of(tmp_path / "out")  # one epoch has no epochs to fall by


def test_what_replaces_the_optimizer_of_trainer_is_named(tmp_path):
    options = ["--l2_weight_decay", "0.001", "--lr_milestones", "1", "--trim_select", "none", "--label_noise", "0.25"]
    assert main([write(tmp_path, IMAGE), *options, "--output_dir", str(tmp_path / "out")]) == 0
    card = card_of(tmp_path / "out")
    assert "- optimizer: Adam with an L2 penalty of 0.001" in card and "times 0.5 after the epochs 1" in card
    assert "AdamW" not in card and "25 % of the training labels were wrong" in card
    assert "everything counts" in card and "p fell" not in card and "hardest samples" not in card


def test_a_trainer_of_the_users_own(tmp_path):
    trainer = train(tiny_vit(), digits(24), tmp_path / "out", trim_keep_start=0.5, trim_keep_end=0.5)
    trainer.create_model_card()
    card = card_of(tmp_path / "out")
    assert "A ViTForImageClassification, trained with hf_trim: of each" in card  # of weights and data nothing is known
    assert "scratch" not in card and "not named" not in card and "It was tested" not in card
    assert "p was 0.5 throughout." in card
    # The best model is not the last one, and has its own evaluation.
    trainer.args.load_best_model_at_end, trainer.state.best_global_step = True, 3
    trainer.state.log_history[:0] = [{"eval_loss": 0.25, "step": 3, "epoch": 1.0}, {"eval_loss": 9.0, "step": 6}]
    trainer.create_model_card()
    card = card_of(tmp_path / "out")
    assert "| loss | 0.25 |" in card
    assert "It is the model after step 3, which was the best in the tests during training." in card


def test_a_model_that_learnt_nothing_is_called_so(compared):
    summary = json.loads((compared[0] / "run.json").read_text())
    summary["metrics"]["error"] = 95.0
    assert "**The model is no better than that.**" in render_card(summary, "a/b").text
    summary["done"] = 1.5
    assert "p was to fall from 1.0 to 0.2 by epoch, over 2 epochs; the training ended after 1.5." in (
        render_card(summary, "a/b").text
    )
