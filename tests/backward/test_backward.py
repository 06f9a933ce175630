"""The ways to run the backward pass: which is chosen, and that none changes what is learned."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_trim import trimmed_mean
from hf_trim.backward.choice import choose_backward, find_mixing_modules
from hf_trim.backward.compiled.backend import uses_cuda_graphs
from tests.support.helpers import (
    digit_texts,
    digits,
    relative_difference,
    tiny_bert,
    tiny_resnet,
    tiny_vit,
    train,
    weights,
)


class Adder(torch.autograd.Function):
    """A user's own Function, whose backward the engine knows nothing of."""

    @staticmethod
    def forward(ctx, x):
        return x + 1

    @staticmethod
    def backward(ctx, grad):
        return grad.clone()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mode", ["sparse", "replay", "auto"])
@pytest.mark.parametrize("make_model, make_rows", [(tiny_bert, digit_texts), (tiny_vit, digits)], ids=["bert", "vit"])
def test_each_way_learns_what_dense_learns(make_model, make_rows, mode, accumulate, tmp_path):
    # Replay draws dropout masks anew, the others do not.
    model = lambda: make_model(dropout=0.0 if mode == "replay" else 0.1)  # noqa: E731
    arguments = {"num_train_epochs": 3, "gradient_accumulation_steps": accumulate}
    dense = train(model(), make_rows(43), tmp_path, trim_backward="dense", **arguments)
    trained = train(model(), make_rows(43), tmp_path, trim_backward=mode, trim_strict=mode == "sparse", **arguments)
    assert trained.losses == pytest.approx(dense.losses, rel=1e-4)
    assert relative_difference(weights(trained) - weights(model()), weights(dense) - weights(model())) < 1e-4


def test_batch_norm_makes_auto_dense_and_the_log_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        auto = train(tiny_resnet(), digits(), tmp_path)
    (message,) = [record.message for record in caplog.records if "backward pass" in record.message]
    assert all(words in message for words in ("dense", "batch-norm modules", "mix the samples"))
    dense = train(tiny_resnet(), digits(), tmp_path, trim_backward="dense")
    assert torch.equal(weights(auto), weights(dense))


def test_choice():
    bert, resnet = tiny_bert().train(), tiny_resnet().train()
    assert choose_backward("auto", bert, True, 0.5)[0] == "sparse"
    assert choose_backward("sparse", bert, False, 0.5)[0] == "dense"
    assert "for the kept tokens alone" in choose_backward("auto", bert, False, 0.5, chunked_head=True)[1]
    assert choose_backward("dense", bert, True, 0.5) == ("dense", "asked for")
    assert choose_backward("replay", bert, False, 0.5)[0] == "dense"
    assert choose_backward("auto", resnet, True, 0.5)[0] == "dense"
    assert "gradients differ from those of dense" in choose_backward("replay", resnet, True, 0.5)[1]
    for module in resnet.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    assert find_mixing_modules(resnet) == [] and choose_backward("auto", resnet, True, 0.5)[0] == "sparse"
    compiled = torch.compile(bert)
    assert choose_backward("auto", compiled, True, 0.5)[0] == "sparse"
    assert choose_backward("auto", compiled, True, 0.5, refusal="rows meet")[0] == "replay"
    assert "rows meet" in choose_backward("auto", compiled, True, 0.5, refusal="rows meet")[1]
    assert choose_backward("auto", compiled, True, 0.8, refusal="rows meet")[0] == "dense"
    assert choose_backward("auto", compiled, False, 0.5)[0] == "dense"
    assert not uses_cuda_graphs(compiled) and uses_cuda_graphs(torch.compile(bert, mode="reduce-overhead"))
    bert.bert.encoder.compile(options={"triton.cudagraphs": True})
    assert uses_cuda_graphs(bert)


def make_batch():
    rows = digits(32)
    return torch.stack([row["pixel_values"] for row in rows]), torch.tensor([row["labels"] for row in rows])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("select", ["hardest", "random"])
@pytest.mark.parametrize("keep", [0.01, 0.25, 0.9, 1.0])
def test_trimmed_mean_in_a_plain_loop(keep, select, autocast):
    images, labels = make_batch()

    def gradients(backward):
        model = tiny_vit().train()
        losses_of = lambda rows: F.cross_entropy(  # noqa: E731
            model(images if rows is None else images[rows]).logits,
            labels if rows is None else labels[rows],
            reduction="none",
        )
        arguments = {"select": select, "backward": backward, "generator": torch.Generator().manual_seed(0)}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if backward == "replay":
                loss = trimmed_mean(losses_of, keep, model=model, **arguments)
            else:
                loss = trimmed_mean(losses_of(None), keep, **arguments)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    dense = gradients("dense")
    tolerance = 2e-2 if autocast else 1e-5
    for backward in ("sparse", "auto", "replay"):
        assert relative_difference(gradients(backward), dense) < tolerance


def test_an_op_of_ones_own_is_counted_once_and_strict_refuses_it(tmp_path, caplog):
    class Own(nn.Module):
        def forward(self, x):
            return Adder.apply(x)

    def model():
        bert = tiny_bert()
        bert.bert.pooler.dense = nn.Sequential(bert.bert.pooler.dense, Own())
        return bert

    with caplog.at_level(logging.WARNING):
        sparse = train(model(), digit_texts(), tmp_path, trim_backward="sparse")
    (message,) = [record.message for record in caplog.records if "without a row-sparse rule" in record.message]
    assert "AdderBackward" in message
    dense = train(model(), digit_texts(), tmp_path, trim_backward="dense")
    assert relative_difference(weights(sparse), weights(dense)) < 1e-5
    with pytest.raises(RuntimeError, match="AdderBackward"):
        train(model(), digit_texts(), tmp_path, trim_backward="sparse", trim_strict=True)


def test_strict_needs_sparse(tmp_path):
    with pytest.raises(ValueError, match="trim_strict needs trim_backward='sparse'"):
        train(tiny_vit(), digits(), tmp_path, trim_strict=True)
