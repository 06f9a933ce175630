"""Each kind of head in real trainings: with p = 1 as plain Trainer, with p < 1 as a plain PyTorch loop."""

import pytest
import torch
from transformers import Trainer

from tests.support.heads import HEADS, make, reference_loop
from tests.support.helpers import relative_difference, train, weights


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.extended), 3])
@pytest.mark.parametrize("head", HEADS)
def test_without_trimming_equals_plain_trainer(head, accumulate, tmp_path):
    rows, arguments = HEADS[head][1](), {"gradient_accumulation_steps": accumulate, "num_train_epochs": 1}
    plain = train(make(head), rows, tmp_path, trainer_cls=Trainer, **arguments)
    ours = train(make(head), rows, tmp_path, trim_keep_start=1.0, trim_keep_end=1.0, **arguments)
    assert ours.losses == plain.losses
    assert torch.equal(weights(ours), weights(plain))
    # The first step of a trimmed training, with p = 1, goes through the trimming code.
    ours = train(make(head), rows, tmp_path, **{**arguments, "max_steps": 1})
    assert ours.losses == pytest.approx(plain.losses[:1], rel=1e-6)
    plain = train(make(head), rows, tmp_path, trainer_cls=Trainer, **{**arguments, "max_steps": 1})
    assert relative_difference(weights(ours) - weights(make(head)), weights(plain) - weights(make(head))) < 1e-6


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("head", HEADS)
def test_trimming_follows_the_reference_loop(head, accumulate, tmp_path):
    rows = HEADS[head][1]()
    arguments = {
        "trim_keep_start": 0.3,
        "trim_keep_end": 0.3,
        "gradient_accumulation_steps": accumulate,
        "num_train_epochs": 1,
    }
    ours = train(make(head), rows, tmp_path, **arguments)
    reference, logged = reference_loop(head, ours.batches, accumulate, 0.3)
    assert ours.losses == pytest.approx(logged, rel=1e-4)
    start = weights(make(head))
    assert relative_difference(weights(ours) - start, weights(reference) - start) < 1e-4
