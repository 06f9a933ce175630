"""What is logged beside the loss."""

import pytest

from tests.support.helpers import (
    digits,
    tiny_vit,
    train,
)


def test_logged_metrics(tmp_path):
    trimmed = train(tiny_vit(), digits(), tmp_path, num_train_epochs=3, logging_strategy="epoch")
    logs = [log for log in trimmed.state.log_history if "loss" in log]
    assert [log["keep_fraction"] for log in logs] == pytest.approx([1.0, 0.6, 0.2])
    assert [log["kept_fraction"] for log in logs] == pytest.approx([1.0, 5 / 8, 2 / 8])
    assert logs[0]["full_loss"] == pytest.approx(logs[0]["loss"], rel=1e-4)
    for log in logs[1:]:
        assert log["trim_threshold"] < log["loss"] and log["full_loss"] < log["loss"]
    untrimmed = train(tiny_vit(), digits(), tmp_path, trim_select="none")
    for log in untrimmed.state.log_history[:-1]:
        assert log["keep_fraction"] == log["kept_fraction"] == 1.0
        assert log["full_loss"] == pytest.approx(log["loss"], rel=1e-4)


def test_random_control_keeps_as_many_but_others(tmp_path):
    hardest = train(tiny_vit(), digits(), tmp_path, trim_keep_start=0.25, trim_keep_end=0.25)
    rand = train(tiny_vit(), digits(), tmp_path, trim_keep_start=0.25, trim_keep_end=0.25, trim_select="random")
    first, control = hardest.state.log_history[0], rand.state.log_history[0]
    assert control["kept_fraction"] == first["kept_fraction"] == 0.25
    assert control["full_loss"] == first["full_loss"]
    assert control["loss"] < first["loss"]
    again = train(tiny_vit(), digits(), tmp_path, trim_keep_start=0.25, trim_keep_end=0.25, trim_select="random")
    assert again.losses == rand.losses
