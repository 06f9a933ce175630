"""fp16: a gradient that overflows is the scaler's to skip, as in plain Trainer."""

import torch
from transformers import Trainer

from hf_trim import TrimmingTrainer
from tests.support.helpers import digits, relative_difference, tiny_vit, train, weights


SCALE = 2.0**22  # float16 ends at 2**16


class Half:
    """Trains with autocast to float16 and a gradient scaler on the CPU, where accelerate has none."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)

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
