"""The warnings of a training that trimming harms."""

import pytest
import torch
from transformers import TrainerState

from hf_trim import TrimmingArguments
from hf_trim.trainer.guard import evaluates_worse, unlearns
from hf_trim.trainer.notices import Notices
from tests.support.heads import make, texts, tokens_or_none
from tests.support.helpers import digits, tiny_vit, train


def logs(losses, fractions):
    return [{"full_loss": loss, "keep_fraction": p} for loss, p in zip(losses, fractions, strict=True)]


FALLING = [1.0, 0.8, 0.6, 0.4, 0.2]
LONG = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
RISING = [2.0, 1.5, 1.4, 1.45, 1.6, 1.8, 2.1, 2.4]


@pytest.mark.parametrize(
    "losses, fractions, expected",
    [
        (RISING, LONG, (1.425, 0.75, 2.25, 0.35)),
        ([2.0, 1.5, 1.2, 1.0, 0.9], FALLING, None),
        (RISING, [1.0] * 8, None),  # it would have risen without trimming, too
        ([2.0, 1.5, 1.49, 1.5, 1.52], FALLING, None),  # within 5 %
        ([1.0, 2.0], [1.0, 0.2], None),  # too few logs
    ],
)
def test_a_rising_loss_of_all_items(losses, fractions, expected):
    assert unlearns(logs(losses, fractions)) == (expected if expected is None else pytest.approx(expected))


def test_noise_of_single_steps_is_no_rise():
    noise = (1 + 0.4 * torch.randn(80, generator=torch.Generator().manual_seed(0))).tolist()
    fractions = [1 - i / 100 for i in range(80)]
    assert unlearns(logs(noise, fractions)) is None
    assert unlearns(logs([x + max(0, i - 40) / 20 for i, x in enumerate(noise)], fractions)) is not None


@pytest.mark.parametrize(
    "values, name, greater, expected",
    [
        ([0.9, 0.5, 0.4, 0.6, 0.7], "eval_loss", False, (0.4, 0.6, 0.7, 0.2)),
        ([0.9, 0.5, 0.05, 0.06, 0.08], "eval_loss", False, None),  # small losses vary
        ([0.9, 0.5, 0.05, 0.06, 0.08], "eval_error", False, (0.05, 0.6, 0.08, 0.2)),
        ([0.5, 0.8, 0.9, 0.85, 0.7], "eval_accuracy", True, (0.9, 0.6, 0.7, 0.2)),
        ([0.5, 0.8, 0.9, 0.9, 0.88], "eval_accuracy", True, None),
    ],
)
def test_an_evaluation_below_the_best(values, name, greater, expected):
    history = [x for value, p in zip(values, FALLING, strict=True) for x in ({"keep_fraction": p}, {name: value})]
    assert evaluates_worse(history, name, greater) == expected


def test_a_recipe_calls_its_evaluations_by_their_split(caplog):
    notices = Notices()
    history = [{"keep_fraction": 1.0}, {"eval_error": 5.0}, {"keep_fraction": 0.2}, {"eval_error": 9.0}]
    args = TrimmingArguments("unused", metric_for_best_model="error", greater_is_better=False, use_cpu=True)
    state = TrainerState(log_history=history, global_step=4, max_steps=10)
    notices.tell_harm(state, args, args)
    assert not caplog.text  # the first evaluations say little
    state.global_step = 5
    notices.tell_harm(state, args, args)
    assert "eval_error was 5 when p was 1.00" in caplog.text
    notices.eval_name = "validation"
    notices.tell_harm(state, args, args)
    assert "validation_error was 5 when p was 1.00, and is 9 at p = 0.20" in caplog.text


def test_a_language_model_that_unlearns_its_easy_tokens_is_told(tmp_path, caplog):
    """Most tokens are padding that is labelled: easy, and soon left out."""
    rows = [{**row, "labels": row["input_ids"]} for row in texts(tokens_or_none)]
    arguments = {"num_train_epochs": 8, "learning_rate": 0.5, "logging_strategy": "epoch", "trim_schedule": "epoch"}
    train(make("llama"), rows, tmp_path, trim_keep_end=0.05, **arguments)
    assert caplog.text.count("unlearns what is left out, or the learning rate is too high. Raise trim_keep_end") == 1
    caplog.clear()
    train(make("llama"), rows, tmp_path, num_train_epochs=8, learning_rate=0.5, trim_schedule="adaptive")
    kwargs = {"trainer_kwargs": {"eval_dataset": digits(16)}, "eval_strategy": "epoch"}
    train(tiny_vit(), digits(), tmp_path, num_train_epochs=3, **kwargs)
    assert "unlearns" not in caplog.text and "eval_loss was" not in caplog.text
