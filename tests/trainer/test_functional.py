"""`trimmed_mean` in a plain PyTorch loop."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from hf_trim import trimmed_mean


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


def test_trimmed_mean_of_losses_that_are_not_finite():
    losses = torch.tensor([1.0, torch.nan, 3.0, torch.inf, 2.0], requires_grad=True)
    with pytest.raises(ValueError, match="2 of 5 losses are NaN or infinite"):
        trimmed_mean(losses, keep=0.5)
    for backward in ("dense", "sparse"):
        loss = trimmed_mean(losses, keep=0.7, nonfinite="drop", backward=backward)
        assert loss == 2.5
        (gradient,) = torch.autograd.grad(loss, losses)
        assert gradient.tolist() == [0.0, 0.0, 0.5, 0.0, 0.5]
