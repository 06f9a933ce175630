"""Replay: scoring leaves no trace, and the kept samples are trained on as any batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_trim import trimmed_mean
from hf_trim.backward.replay import rows_of, scoring
from tests.support.helpers import digits, tiny_vit


def test_scoring_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with scoring(model):
        scored = model(torch.rand(4, 1, 8, 8))
    assert not scored.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rows_of_a_batch():
    inputs = {"x": torch.arange(12).view(4, 3), "mask": torch.ones(1, 3), "flag": True, "scale": torch.tensor(2.0)}
    rows = rows_of(inputs, torch.tensor([1, 3]), 4)
    assert rows["x"].tolist() == [[3, 4, 5], [9, 10, 11]]
    assert all(rows[name] is inputs[name] for name in ("mask", "flag", "scale"))


def test_replay_of_a_batch_without_items():
    batch = digits(32)
    images = torch.stack([row["pixel_values"] for row in batch])
    labels = torch.tensor([row["labels"] for row in batch])
    model = tiny_vit().train()
    losses_of = lambda rows: F.cross_entropy(  # noqa: E731
        model(images if rows is None else images[rows]).logits,
        labels if rows is None else labels[rows],
        reduction="none",
    )
    nothing = torch.zeros(32, dtype=torch.bool)
    loss = trimmed_mean(losses_of, 0.5, valid=nothing, backward="replay", model=model)
    loss.backward()
    assert loss.item() == 0 and all(not p.grad.any() for p in model.parameters())


def test_trimmed_mean_needs_a_function_for_replay():
    for arguments in ({"losses": torch.ones(3)}, {"losses": lambda rows: torch.ones(3)}):
        with pytest.raises(ValueError, match="runs the model twice"):
            trimmed_mean(keep=0.5, backward="replay", **arguments)
    with pytest.raises(ValueError, match="runs the model twice"):
        trimmed_mean(lambda rows: torch.ones(3), 0.5, backward="sparse")
