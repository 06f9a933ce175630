"""Compiled models in `TrimmingTrainer`: the gradients of the eager ones, and what it does where a graph is refused."""

import logging

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from hf_trim.backward.settings import refused_graphs
from tests.support.compiled import Do, one_block_resnet, one_layer_bert
from tests.support.helpers import digit_texts, digits, relative_difference, train, weights


pytestmark = pytest.mark.usefixtures("fresh_compiler")

COMPILED = {"remove_unused_columns": False, "label_names": ["labels"]}  # a compiled model does not tell its arguments


def test_cuda_graphs_are_refused(tmp_path):
    call = torch.compile(lambda x: x.sin(), backend="hf_trim", mode="reduce-overhead")
    with pytest.raises(Exception, match="a CUDA graph replays one batch size"):
        call(torch.ones(3, requires_grad=True))
    with pytest.raises(ValueError, match="trim_backward='sparse' cannot go with CUDA graphs"):
        train(one_layer_bert(), digit_texts(), tmp_path, trim_backward="sparse", torch_compile_mode="max-autotune")
    model = torch.compile(one_layer_bert(), mode="reduce-overhead")
    with pytest.raises(ValueError, match="trim_backward='sparse' cannot go with CUDA graphs"):
        train(model, digit_texts(), tmp_path, trim_backward="sparse")


@pytest.mark.parametrize("backward", [pytest.param("auto", marks=pytest.mark.extended), "sparse"])
def test_the_trainer_compiles_for_rows(backward, tmp_path, caplog, runs):
    arguments = {
        "trim_keep_start": 1.0,
        "trim_keep_end": 0.25,
        "num_train_epochs": 4,
        "trim_check": backward == "auto",
    }
    eager = train(one_layer_bert(), digit_texts(44), tmp_path, trim_backward=backward, **arguments)
    compiled = train(
        one_layer_bert(), digit_texts(44), tmp_path, trim_backward=backward, trim_strict=backward == "sparse",
        torch_compile=True, torch_compile_backend="aot_eager", **arguments,
    )  # fmt: skip
    assert not refused_graphs()
    assert len(runs) == 3 * 6  # the last of the 6 mini-batches of an epoch is short
    assert counters["stats"]["unique_graphs"] == 1
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-4)
    assert relative_difference(weights(compiled), weights(eager)) < 1e-5


@pytest.mark.extended
def test_a_model_that_comes_compiled(tmp_path, runs):
    """As a whole, or regions of it; the length of its texts is the batch size."""
    rows = digit_texts(length=8)
    arguments = {"trim_keep_start": 0.5, "trim_keep_end": 0.5, "max_steps": 3, **COMPILED}
    eager = train(one_layer_bert(dropout=0.0), rows, tmp_path, **arguments)
    whole = torch.compile(one_layer_bert(dropout=0.0), backend="aot_eager")
    regions = one_layer_bert(dropout=0.0, problem_type=None)
    regions.bert.encoder.compile(backend="aot_eager", dynamic=True)
    for model in (whole, regions):
        compiled = train(model, rows, tmp_path, **arguments)
        assert relative_difference(weights(compiled), weights(eager)) < 1e-5
    assert len(runs) == 6 and not refused_graphs()


@pytest.mark.extended
def test_auto_goes_on_with_replay_where_the_graph_is_refused(tmp_path, caplog):
    def model():
        bert = one_layer_bert(dropout=0.0)
        bert.bert.pooler = nn.Sequential(bert.bert.pooler, Do(lambda x: x if x.shape[0] == 8 else x.clone()))
        return bert

    arguments = {"trim_keep_start": 0.5, "trim_keep_end": 0.5, "max_steps": 3, **COMPILED}
    eager = train(model(), digit_texts(), tmp_path, **arguments)
    with caplog.at_level(logging.WARNING):
        compiled = train(torch.compile(model(), backend="aot_eager"), digit_texts(), tmp_path, **arguments)
    assert "the replay backward pass: a compiled graph cannot run on the kept rows: it was compiled for" in caplog.text
    assert relative_difference(weights(compiled), weights(eager)) < 1e-5


def test_auto_does_not_try_batch_norm(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(one_block_resnet(), digits(), tmp_path, torch_compile=True, torch_compile_backend="aot_eager",
              max_steps=1, trim_keep_start=0.5, trim_keep_end=0.5)  # fmt: skip
    assert "dense" in caplog.text and "batch-norm modules" in caplog.text and not refused_graphs()
