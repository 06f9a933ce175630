"""The ways to run the backward pass: which is chosen, and that none changes what is learned."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_trim import trimmed_mean
from hf_trim.backward.choice import choose_backward, mixing_modules
from hf_trim.backward.compiled.backend import uses_cuda_graphs
from hf_trim.backward.replay import rows_of, scoring
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
from tests.trainer.test_heads import HEADS, make


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
    other = train(model(), make_rows(43), tmp_path, trim_backward=mode, trim_strict=mode == "sparse", **arguments)
    assert other.losses == pytest.approx(dense.losses, rel=1e-4)
    assert relative_difference(weights(other) - weights(model()), weights(dense) - weights(model())) < 1e-4


def test_batch_norm_makes_auto_dense_and_the_log_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        auto = train(tiny_resnet(), digits(), tmp_path)
    said = [record.message for record in caplog.records if "Backward pass" in record.message]
    assert len(said) == 1 and "dense" in said[0] and "batch-norm modules" in said[0] and "mix the samples" in said[0]
    dense = train(tiny_resnet(), digits(), tmp_path, trim_backward="dense")
    assert torch.equal(weights(auto), weights(dense))


def test_choice():
    bert, resnet = tiny_bert().train(), tiny_resnet().train()
    assert choose_backward("auto", bert, True, 0.5)[0] == "sparse"
    assert choose_backward("sparse", bert, False, 0.5)[0] == "dense"
    assert "kept tokens only" in choose_backward("auto", bert, False, 0.5, chunked_head=True)[1]
    assert choose_backward("dense", bert, True, 0.5) == ("dense", "asked for")
    assert choose_backward("replay", bert, False, 0.5)[0] == "dense"
    assert choose_backward("auto", resnet, True, 0.5)[0] == "dense"
    assert "gradients are not those of dense" in choose_backward("replay", resnet, True, 0.5)[1]
    for module in resnet.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    assert mixing_modules(resnet) == [] and choose_backward("auto", resnet, True, 0.5)[0] == "sparse"
    compiled = torch.compile(bert)
    assert choose_backward("auto", compiled, True, 0.5)[0] == "sparse"
    assert choose_backward("auto", compiled, True, 0.5, refused="rows meet")[0] == "replay"
    assert "rows meet" in choose_backward("auto", compiled, True, 0.5, refused="rows meet")[1]
    assert choose_backward("auto", compiled, True, 0.8, refused="rows meet")[0] == "dense"
    assert choose_backward("auto", compiled, False, 0.5)[0] == "dense"
    assert not uses_cuda_graphs(compiled) and uses_cuda_graphs(torch.compile(bert, mode="reduce-overhead"))
    bert.bert.encoder.compile(options={"triton.cudagraphs": True})
    assert uses_cuda_graphs(bert)


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


def test_replay_of_a_batch_without_items():
    images, labels = make_batch()
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
    said = [record.message for record in caplog.records if "without a row-sparse rule" in record.message]
    assert len(said) == 1 and "AdderBackward" in said[0]
    dense = train(model(), digit_texts(), tmp_path, trim_backward="dense")
    assert relative_difference(weights(sparse), weights(dense)) < 1e-5
    with pytest.raises(RuntimeError, match="AdderBackward"):
        train(model(), digit_texts(), tmp_path, trim_backward="sparse", trim_strict=True)


def test_strict_needs_sparse(tmp_path):
    with pytest.raises(ValueError, match="trim_strict needs trim_backward='sparse'"):
        train(tiny_vit(), digits(), tmp_path, trim_strict=True)


def test_a_compiled_model_is_trimmed_by_its_logits(tmp_path):
    """Loss functions inside a compiled graph cannot be met; the model's own is called on its logits."""
    arguments = {"trim_keep_start": 0.75, "trim_keep_end": 0.75, "max_steps": 2, "trim_backward": "dense"}
    eager = train(tiny_bert(dropout=0.0), digit_texts(), tmp_path, **arguments)
    compiled = train(
        tiny_bert(dropout=0.0),
        digit_texts(),
        tmp_path,
        torch_compile=True,
        torch_compile_backend="aot_eager",
        **arguments,
    )
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-5)
    assert relative_difference(weights(compiled), weights(eager)) < 1e-6


def test_compiled_heads(tmp_path):
    for head in ("llama", "gpt2", "masked-lm", "question-answering"):
        rows = HEADS[head][1]()
        arguments = {"trim_keep_start": 0.3, "trim_keep_end": 0.3, "max_steps": 2, "gradient_accumulation_steps": 2}
        eager = train(make(head), rows, tmp_path, **arguments)
        compiled = train(
            make(head), rows, tmp_path, torch_compile=True, torch_compile_backend="aot_eager", **arguments
        )
        assert compiled.losses == pytest.approx(eager.losses, rel=1e-5), head
        assert relative_difference(weights(compiled), weights(eager)) < 1e-5, head
    with pytest.raises(
        ValueError, match="The compiled MixtralForCausalLM returned the loss"
    ):  # it has an auxiliary one
        # With the load balance of its experts, which is not of its logits.
        train(make("mixtral"), HEADS["mixtral"][1](), tmp_path, torch_compile=True, torch_compile_backend="aot_eager",
              trim_keep_start=0.3, trim_keep_end=0.3, max_steps=1)  # fmt: skip
