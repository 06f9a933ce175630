"""fp16: a gradient or a loss that overflows is the scaler's to skip, as in plain Trainer."""

import logging
import math
from unittest import mock

import pytest
import torch
from transformers import Trainer

from hf_trim import TrimmingTrainer
from hf_trim.backward import waiting
from tests.support.helpers import InOrder, digits, relative_difference, tiny_vit, train, weights


SCALE = 2.0**22  # float16 ends at 2**16


class Half:
    """Trains with autocast to float16 and a gradient scaler on the CPU, where accelerate has none."""

    scale = SCALE

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale)

    def compute_loss_context_manager(self):
        return torch.autocast("cpu", torch.float16)


class HalfTrainer(Half, Trainer):
    pass


class HalfTrimmingTrainer(Half, TrimmingTrainer):
    pass


def run(tmp_path, trainer_cls=HalfTrimmingTrainer, **arguments):
    trainer = train(tiny_vit(), digits(), tmp_path, trainer_cls=trainer_cls, max_grad_norm=0.0, **arguments)
    assert weights(trainer).isfinite().all()
    assert trainer.accelerator.scaler.get_scale() < SCALE  # steps were skipped
    return trainer


def test_overflows_are_skipped(tmp_path):
    plain = run(tmp_path, HalfTrainer)
    assert torch.equal(weights(run(tmp_path, trim_keep_start=1.0, trim_keep_end=1.0)), weights(plain))


def test_overflows_are_skipped_when_trimming(tmp_path):
    arguments = {"trim_keep_start": 0.5, "trim_keep_end": 0.5}
    trimmed = run(tmp_path, trim_backward="sparse", **arguments)
    dense = run(tmp_path, trim_backward="dense", **arguments)
    assert relative_difference(weights(trimmed), weights(dense)) < 1e-3
    assert trimmed.accelerator.scaler.get_scale() == dense.accelerator.scaler.get_scale()
    assert relative_difference(weights(dense), weights(tiny_vit())) > 1e-3  # it trains once the scale is small enough


class HalfInOrder(HalfTrimmingTrainer, InOrder):
    scale = 1.0  # no gradient overflows


class PlainHalfInOrder(Half, Trainer):
    scale = 1.0

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def overflowing(*places):
    """Digits of which some have pixels, and so activations and losses, beyond float16."""
    rows = digits()
    for place in places:
        rows[place]["pixel_values"] = rows[place]["pixel_values"] * 1e6
    return rows


HALF = {"trim_keep_start": 0.5, "trim_keep_end": 0.5}


@pytest.mark.parametrize("on_gpu", [True, pytest.param(False, marks=pytest.mark.extended)])
@pytest.mark.parametrize(
    "arguments",
    [
        {"trim_keep_start": 1.0, "trim_keep_end": 1.0},
        {"trim_keep_start": 1.0, "trim_keep_end": 0.9},  # all are kept in the first epoch
        {**HALF, "trim_backward": "dense"},
        {**HALF, "trim_backward": "sparse"},
        {**HALF, "trim_backward": "replay"},
        {**HALF, "trim_select": "random", "trim_backward": "sparse"},
        {**HALF, "trim_skip_hardest": 0.2, "trim_backward": "sparse"},
        {"trim_schedule": "adaptive", "trim_mass": 0.7, "trim_backward": "sparse"},
    ],
    ids=lambda arguments: ", ".join(map(str, arguments.values())),
)
def test_losses_that_overflow_are_skipped(arguments, on_gpu, tmp_path, caplog):
    """In steps 1, 3 and 4 of 6: in the first one samples, in the third one sample, in the fourth one all of them."""
    rows, options = overflowing(0, 5, 17, *range(24, 32)), {"max_grad_norm": 0.0, "num_train_epochs": 1}
    plain = train(tiny_vit(), rows, tmp_path, trainer_cls=PlainHalfInOrder, **options)
    with mock.patch.object(waiting, "reads_freely", lambda device: not on_gpu), caplog.at_level(logging.WARNING):
        ours = train(tiny_vit(), rows, tmp_path, trainer_cls=HalfInOrder, **options, **arguments)
    assert plain.accelerator.scaler.get_scale() == ours.accelerator.scaler.get_scale() == 2.0**-3
    assert weights(ours).isfinite().all() and relative_difference(weights(ours), weights(tiny_vit())) > 1e-3
    if arguments.get("trim_keep_end") == 1.0:
        assert torch.equal(weights(ours), weights(plain)) and ours.losses == plain.losses
    else:
        (said,) = (text for text in caplog.messages if "the gradient scaler skips the step" in text)
        assert "2 of 8 losses" in said or "The loss of this mini-batch" in said
    for log in ours.state.log_history:
        assert all(math.isfinite(value) for name, value in log.items() if name != "grad_norm"), log


def test_losses_that_overflow_are_dropped_if_asked_for(tmp_path):
    rows, options = overflowing(0, 5, 17), {"max_grad_norm": 0.0, "num_train_epochs": 1, "trim_backward": "sparse"}
    trainer = train(tiny_vit(), rows, tmp_path, trainer_cls=HalfInOrder, trim_nonfinite="drop", **options, **HALF)
    assert trainer.accelerator.scaler.get_scale() == 1.0  # no step is skipped
