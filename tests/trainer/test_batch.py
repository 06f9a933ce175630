"""The trimming of one mini-batch: losses that are not finite, and batches at the edge."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from transformers import set_seed

from hf_trim import TrimmingTrainer
from hf_trim.trainer import lm_head
from tests.support.heads import HEADS, make
from tests.support.helpers import (
    InOrder,
    digits,
    grouped,
    reference_loop,
    relative_difference,
    tiny_vit,
    train,
    weights,
)


def poisoned(rows, *places):
    """Images with NaN for a pixel: so are their activations, and the weights' gradients unless they are kept out."""
    rows = [dict(row) for row in rows]
    for place in places:
        rows[place]["pixel_values"] = rows[place]["pixel_values"].clone()
        rows[place]["pixel_values"][0, 0, 0] = torch.nan
    return rows


def test_losses_that_are_not_finite_end_the_training(tmp_path):
    with pytest.raises(ValueError, match="2 of 8 losses .* are NaN or infinite.*trim_nonfinite='drop'"):
        train(tiny_vit(), poisoned(digits(8), 2, 5), tmp_path, num_train_epochs=1, trim_keep_start=0.5)


@pytest.mark.parametrize("backward", ["auto", "dense", "replay"])
@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_samples_whose_losses_are_not_finite_are_dropped(backward, keep, tmp_path, caplog):
    rows = poisoned(digits(24), 2, 5, 11)
    arguments = {"trim_keep_start": keep, "trim_keep_end": 0.5, "trim_nonfinite": "drop", "num_train_epochs": 2}
    ours = train(tiny_vit(), rows, tmp_path, trim_backward=backward, **arguments)
    assert "have losses that are NaN or infinite, and were dropped" in caplog.text
    reference = tiny_vit()
    batches = []
    for batch in ours.batches:
        good = ~batch["pixel_values"].flatten(1).isnan().any(1)
        batches.append({name: value[good] for name, value in batch.items()})
    logged = reference_loop(
        reference, grouped(batches, 2, 1), [keep, 0.5], lambda x, y: F.cross_entropy(x, y, reduction="none")
    )
    assert ours.losses == pytest.approx(logged, rel=1e-4)
    assert relative_difference(weights(ours) - weights(tiny_vit()), weights(reference) - weights(tiny_vit())) < 1e-4


def test_a_batch_of_which_nothing_is_finite_leaves_the_weights_alone(tmp_path):
    rows = poisoned(digits(8), *range(8))
    ours = train(tiny_vit(), rows, tmp_path, num_train_epochs=1, trim_keep_start=0.5, trim_nonfinite="drop")
    assert ours.losses == [0.0]
    assert torch.equal(weights(ours), weights(tiny_vit()))


@pytest.mark.parametrize("head", ["llama", "token-classification"])
def test_tokens_of_a_dropped_sample_are_dropped(head, tmp_path):
    """One activation of one sample is infinite, whatever is trimmed."""
    rows = HEADS[head][1]()[:8]

    class Poison(torch.nn.Module):
        def forward(self, hidden):
            factor = torch.ones(hidden.shape[0], 1, 1)
            factor[3] = torch.inf
            return hidden * factor

    def model(poison):
        model = make(head)
        embeddings = model.get_input_embeddings()
        if poison:
            embeddings.register_forward_hook(lambda module, args, output: Poison()(output))
        return model

    arguments = {"trim_keep_start": 0.4, "trim_keep_end": 0.4, "num_train_epochs": 1, "trim_nonfinite": "drop"}
    ours = train(model(True), rows, tmp_path, **arguments)
    (batch,) = ours.batches
    finite_rows = [{name: value[i] for name, value in batch.items()} for i in range(8) if i != 3]
    reference = train(model(False), finite_rows, tmp_path, **arguments)
    assert ours.losses == pytest.approx(reference.losses, rel=1e-4)
    start = weights(make(head))
    assert relative_difference(weights(ours) - start, weights(reference) - start) < 1e-4


@pytest.mark.parametrize("head", ["llama", "mixtral", "question-answering", "segmentation", "token-classification"])
def test_a_batch_of_one_sample(head, tmp_path):
    rows = HEADS[head][1]()[:3]
    ours = train(make(head), rows, tmp_path, per_device_train_batch_size=1, num_train_epochs=1, trim_keep_start=0.2)
    assert all(0 < loss < 10 for loss in ours.losses)
    assert all(0 < log["kept_fraction"] <= 1 for log in ours.state.log_history[:-1])


def test_a_batch_without_labels_among_others_counts_for_nothing(tmp_path):
    rows = HEADS["llama"][1]()[:16]
    empty = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows[8:]]
    arguments = {"trim_keep_start": 0.3, "trim_keep_end": 0.3, "num_train_epochs": 1, "gradient_accumulation_steps": 2}
    set_seed(0)
    both = train(make("llama"), rows[:8] + empty, tmp_path, trainer_cls=InOrder, **arguments)
    alone = train(make("llama"), rows[:8], tmp_path, trainer_cls=InOrder, **arguments)
    assert both.losses == pytest.approx(alone.losses, rel=1e-5)
    assert relative_difference(weights(both), weights(alone)) < 1e-6


def test_half_precision_losses_are_ranked_in_float32(tmp_path):
    ours = train(make("token-classification").to(torch.bfloat16), HEADS["token-classification"][1](), tmp_path,
                 trim_keep_start=0.3, trim_keep_end=0.3, num_train_epochs=1)  # fmt: skip
    for log in ours.state.log_history[:-1]:
        assert log["kept_fraction"] == pytest.approx(0.3, abs=0.01) and log["loss"] > log["full_loss"]


@pytest.mark.parametrize("head", ["llama", "question-answering", "pretraining"])
@pytest.mark.parametrize("backward", ["auto", "replay"])
def test_no_graph_outlives_its_step(backward, head, tmp_path, monkeypatch):
    monkeypatch.setattr(lm_head, "MIN_VOCABULARY", 8)
    losses = []

    class Watching(TrimmingTrainer):
        def compute_loss(self, *args, **kwargs):
            if self._batch.scored is None:  # or it is the second pass of a replay
                assert not any(loss() is not None for loss in losses)
            loss = super().compute_loss(*args, **kwargs)
            losses.extend(weakref.ref(call.losses) for call in self._batch.calls)
            return loss

    gc.collect()
    gc.disable()
    try:
        train(make(head), HEADS[head][1](), tmp_path, trainer_cls=Watching, trim_keep_start=0.5, num_train_epochs=1,
              trim_backward=backward, max_steps=3)  # fmt: skip
    finally:
        gc.enable()
    assert losses
