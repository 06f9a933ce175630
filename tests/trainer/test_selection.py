"""p, k and the kept items; `trimmed_mean` in a plain PyTorch loop."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from hf_trim import select_items, trimmed_mean
from hf_trim.trainer.schedule import keep_fraction, linear_fraction, schedule_unit
from hf_trim.trainer.selection import num_kept


def test_fraction_falls_linearly_from_the_first_to_the_last_epoch():
    fractions = [linear_fraction(epoch, 5, 1.0, 0.2) for epoch in range(5)]
    assert fractions == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert linear_fraction(7, 5, 1.0, 0.2) == pytest.approx(0.2)
    assert linear_fraction(0, 1, 0.9, 0.2) == 0.9


def test_fraction_is_constant_within_an_epoch_and_counts_a_part_of_one():
    arguments = {"num_epochs": 2.5, "step": 0, "num_steps": 0}
    fractions = [
        keep_fraction(1.0, 0.2, "epoch", epoch=epoch, **arguments) for epoch in (0.0, 0.99, 1.0, 1.5, 2.0, 2.4)
    ]
    assert fractions == pytest.approx([1.0, 1.0, 0.6, 0.6, 0.2, 0.2])


@pytest.mark.parametrize(
    "asked, epochs, max_steps, unit",
    [("epoch", 3, -1, "epoch"), ("epoch", 1, -1, "step"), ("epoch", 3, 100, "step"), ("step", 3, -1, "step")],
)
def test_schedule_unit(asked, epochs, max_steps, unit):
    assert schedule_unit(asked, epochs, max_steps) == unit


@given(st.floats(0.001, 1.0), st.integers(0, 300))
def test_number_of_kept_items(keep, n):
    k = num_kept(keep, n)
    assert k == (0 if n == 0 else max(1, round(keep * n)))
    assert 0 <= k <= n


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=12).flatmap(
        lambda losses: st.tuples(st.just(losses), st.lists(st.booleans(), min_size=len(losses), max_size=len(losses)))
    ),
    st.floats(0.01, 1.0),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_hardest_items_ties_by_position(losses_and_valid, keep, dtype):
    losses, valid = losses_and_valid
    candidates = [i for i in range(len(losses)) if valid[i]]
    expected = sorted(sorted(candidates, key=lambda i: (-losses[i], i))[: num_kept(keep, len(candidates))])
    kept = select_items(torch.tensor(losses, dtype=dtype), keep, valid=torch.tensor(valid))
    assert kept.tolist() == expected


def test_random_items_are_valid_and_repeatable():
    losses, valid = torch.rand(4, 6), torch.rand(4, 6) > 0.4
    draw = lambda seed: select_items(  # noqa: E731
        losses, 0.5, valid=valid, select="random", generator=torch.Generator().manual_seed(seed)
    )
    assert torch.equal(draw(1), draw(1))
    assert any(not torch.equal(draw(1), draw(seed)) for seed in range(2, 6))
    assert valid.flatten()[draw(1)].all()
    assert len(draw(1)) == num_kept(0.5, int(valid.sum()))


def test_trimmed_mean_trains_like_topk_in_a_plain_loop():
    images, labels = (torch.tensor(values) for values in load_digits(return_X_y=True))
    images = images.float() / 16

    def fit(loss_of):
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for start in range(0, 512, 64):
            batch = slice(start, start + 64)
            loss_of(F.cross_entropy(model(images[batch]), labels[batch], reduction="none")).backward()
            optimizer.step(), optimizer.zero_grad()
        return model.weight

    ours = fit(lambda losses: trimmed_mean(losses, 0.25))
    assert torch.allclose(ours, fit(lambda losses: torch.topk(losses, 16).values.mean()), atol=1e-6)
    assert not torch.allclose(ours, fit(torch.mean), atol=1e-3)
    assert torch.equal(fit(lambda losses: trimmed_mean(losses, 1.0)), fit(torch.mean))
    assert torch.equal(fit(lambda losses: trimmed_mean(losses, 0.25, select="none")), fit(torch.mean))


def test_trimmed_mean_of_valid_tokens():
    losses = torch.tensor([[5.0, 1.0, 9.0], [4.0, 2.0, 3.0]], requires_grad=True)
    valid = torch.tensor([[True, True, False], [True, True, True]])
    loss = trimmed_mean(losses, 0.4, valid=valid)
    loss.backward()
    assert loss.item() == 4.5
    assert losses.grad.tolist() == [[0.5, 0, 0], [0.5, 0, 0]]
    nothing = trimmed_mean(losses, 0.4, valid=torch.zeros_like(valid))
    assert nothing.item() == 0 and nothing.requires_grad


@pytest.mark.parametrize(
    "losses, keep, arguments, match",
    [
        (torch.tensor(1.0), 0.5, {}, "unreduced"),
        (torch.tensor([1, 2]), 0.5, {}, "floating-point"),
        (torch.ones(3), 0.0, {}, "keep must be a fraction"),
        (torch.ones(3), 20, {}, "keep must be a fraction"),
        (torch.ones(3), 0.5, {"valid": torch.ones(2, dtype=torch.bool)}, r"boolean mask of the losses' shape \[3\]"),
        (torch.ones(3), 0.5, {"valid": torch.ones(3)}, "boolean mask"),
        (torch.ones(3), 0.5, {"select": "hardst"}, "Did you mean 'hardest'"),
        (torch.ones(3), 0.5, {"backward": "dence"}, "Did you mean 'dense'"),
    ],
)
def test_trimmed_mean_refuses(losses, keep, arguments, match):
    with pytest.raises(ValueError, match=match):
        trimmed_mean(losses, keep, **arguments)
