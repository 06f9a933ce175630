"""Resumed trainings, and the best model at the end."""

import pytest
import torch

from tests.support.helpers import (
    digit_texts,
    digits,
    tiny_bert,
    tiny_vit,
    train,
    weights,
)


@pytest.mark.parametrize("model", ["bert", "vit"])
@pytest.mark.parametrize("select", ["hardest", "random"])
def test_resuming_in_the_middle_of_an_epoch_changes_nothing(model, select, tmp_path):
    # ViT's checkpoints have other names than its parameters, BERT's the same.
    make_model, rows = {"bert": (tiny_bert, digit_texts()), "vit": (tiny_vit, digits())}[model]
    arguments = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4, "trim_select": select}
    whole = train(make_model(dropout=0.2), rows, tmp_path, **arguments)
    resumed = train(make_model(dropout=0.2), rows, tmp_path, resume=str(tmp_path / "checkpoint-8"), **arguments)
    history = [log for log in whole.state.log_history if "loss" in log]
    assert history[8]["epoch"] == pytest.approx(1.5)
    assert resumed.losses == whole.losses[8:]
    names = ("keep_fraction", "kept_fraction", "trim_threshold")
    again = [log for log in resumed.state.log_history if "loss" in log]
    assert [[log.get(name) for name in names] for log in again] == [
        [log.get(name) for name in names] for log in history
    ]
    assert torch.equal(weights(resumed), weights(whole))


def test_best_model_is_loaded_whole(tmp_path):
    arguments = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "num_train_epochs": 3,
    }
    rows = digits()
    # The rate is far too high: the first epoch's model is not the last one's.
    trainer = train(tiny_vit(), rows, tmp_path, learning_rate=3.0, trainer_kwargs={"eval_dataset": rows}, **arguments)
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert min(losses) < losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
