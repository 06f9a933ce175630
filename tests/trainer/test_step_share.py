"""What a mini-batch counts for in its optimizer step."""

import pytest
import torch

from hf_trim.trainer.step_share import BatchLabels, OptimizerStep, step_share


def test_share_of_one_of_two_mini_batches():
    share = step_share(0.5, 8, step_kept=6, step_items=12)
    assert (share.kept, share.valid, share.items_per_kept) == pytest.approx((4 / 6, 8 / 12, 2.0))
    nothing = step_share(0.5, 0, step_kept=0, step_items=0)
    assert (nothing.kept, nothing.valid, nothing.items_per_kept) == (1.0, 1.0, 1.0)


def test_items_are_counted_from_labels():
    labels = torch.tensor([[5, 6, -100], [7, -100, -100], [-100, -100, -100]])
    batch = BatchLabels.of({"input_ids": torch.zeros(3, 3), "labels": labels})
    assert batch.size == 3 and batch.num_samples() == 2
    assert batch.num_tokens(-100, shifted=False) == 3
    assert batch.num_tokens(-100, shifted=True) == 1  # the first label of a text predicts nothing
    shifted = BatchLabels.of({"input_ids": torch.zeros(3, 3), "labels": labels, "shift_labels": labels[:, 1:]})
    assert shifted.num_tokens(-100, shifted=False) == 1
    assert BatchLabels.of({"pixel_values": torch.zeros(4, 1, 8, 8)}).num_samples() == 4


def test_mini_batches_of_a_step_follow_each_other():
    step = OptimizerStep()
    step.begin([{"labels": torch.zeros(size)} for size in (4, 2)])
    assert (step.position, step.remaining) == (0, 2)
    step.advance()
    assert (step.position, step.remaining) == (1, 1)
    step.begin([{"labels": torch.zeros(4)}])
    assert (step.position, step.remaining) == (0, 1)
