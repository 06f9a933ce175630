"""The benchmark runs end to end, and it refuses what it does not understand."""

import json

import pytest
import torch

from hf_trim.bench.__main__ import main
from hf_trim.bench.arguments import MODEL_CHOICES
from hf_trim.bench.models import MODELS
from hf_trim.bench.summary import bound_speedup


TINY = ["--layers", "1", "--hidden_size", "64", "--vocab_size", "50", "--seq_length", "8", "--batch_size", "6"]


@pytest.mark.parametrize("extra", [[], ["--dropout", "0", "--gradient_checkpointing"]])
def test_end_to_end(tmp_path, capsys, extra):
    output = tmp_path / "folder" / "bench.json"
    arguments = ["--models", "bert", "vit", "--keep", "1.0", "0.34", "--repeats", "2", "--device", "cpu"]
    assert main([*TINY, *arguments, *extra, "--output", str(output)]) == 0
    content = json.loads(output.read_text())
    assert set(content) == {"arguments", "hardware", "versions", "models"}
    printed = capsys.readouterr().out
    for name in ("bert", "vit"):
        assert f"{name}: " in printed
        result = content["models"][name]
        steps = {(step["mode"], step["keep"]): step for step in result["steps"]}
        modes = ("dense", "sparse", "replay")
        assert set(steps) == {("untrimmed", 1.0), *((mode, keep) for mode in modes for keep in (0.34, 1.0))}
        assert not any(step["fallbacks"] for step in steps.values())
        assert all(step["peak_memory_bytes"] > 0 for step in steps.values())
        assert steps["sparse", 0.34]["kept_fraction"] == pytest.approx(2 / 6)
        assert 0 < steps["sparse", 0.34]["gradient_error"] <= 1e-5  # 0 would be the same pass twice
        replay_error = steps["replay", 0.34]["gradient_error"]
        # With dropout (BERT's own 0.1) replay draws other masks, and there is nothing to compare with.
        assert replay_error is None if name == "bert" and not extra else replay_error <= 1e-5
        expected = bound_speedup("sparse", 2 / 6, **result["dense_seconds"])
        assert steps["sparse", 0.34]["bound"] == pytest.approx(expected)
        assert len(steps["sparse", 0.34]["rounds"]) == 2


@pytest.mark.extended
def test_compiled_models(tmp_path, monkeypatch):
    # Inductor's graphs, run op by op: no C++ compiler is waited for. The other tests make their model with the backend
    # "hf_trim", and tests/backward compiles with it.
    torch_compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, backend: torch_compile(model, backend="aot_eager_decomp_partition")
    )
    output = tmp_path / "bench.json"
    assert main([*TINY, "--models", "vit", "--keep", "0.5", "--modes", "sparse", "replay", "--repeats", "2",
                 "--device", "cpu", "--torch_compile", "--dropout", "0", "--output", str(output)]) == 0  # fmt: skip
    result = json.loads(output.read_text())["models"]["vit"]
    steps = {step["mode"]: step for step in result["steps"]}
    modes = ["dense", "sparse", "replay"]
    assert list(steps) == ["untrimmed", *modes, *(f"compiled {mode}" for mode in modes)]
    assert not any(step["fallbacks"] for step in steps.values())
    assert 0 < steps["compiled sparse"]["gradient_error"] <= 1e-5
    assert steps["compiled replay"]["gradient_error"] <= 1e-5
    dense = result["dense_seconds"]
    for mode in ("sparse", "replay"):
        expected = bound_speedup(mode, 0.5, dense["compiled_forward"], dense["compiled_backward"])
        assert steps[f"compiled {mode}"]["bound"] == pytest.approx(expected)
    assert steps["compiled dense"]["first_seconds"] > steps["compiled sparse"]["first_seconds"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "convnextv2", "swin", "t5", "gpt2-lm", "lm-head"])
@pytest.mark.extended
def test_other_models(tmp_path, name):
    output = tmp_path / "bench.json"
    assert main([*TINY, "--models", name, "--keep", "0.5", "--modes", "sparse", "--repeats", "1", "--device", "cpu",
                 "--dtype", "bfloat16", "--output", str(output)]) == 0  # fmt: skip
    untrimmed, dense, sparse = json.loads(output.read_text())["models"][name]["steps"]
    assert (untrimmed["mode"], dense["mode"], sparse["mode"]) == ("untrimmed", "dense", "sparse")
    assert sparse["gradient_error"] < 0.05
    assert not sparse["fallbacks"]


def test_each_choice_of_a_model_can_be_built():
    assert tuple(MODELS) == MODEL_CHOICES


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--models", "brt"], "Did you mean 'bert'?"),
        (["--modes", "sparce"], "Did you mean 'sparse'?"),
        (["--keep", "0.2", "0"], "keep must be fractions in (0, 1]"),
        (["--keep", "much"], "keep"),
        (["--hidden_size", "100"], "multiple of 64"),
        (["--repeats", "0"], "repeats must be at least 1"),
        (["--dtype", "float16"], "dtype must be one of"),
        (["--dropout", "1"], "dropout must be in [0, 1)"),
        (["--gradient_checkpointing"], "none for convnext"),
        (["--seq_len", "8"], "--seq_len"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_what_the_trainer_adds_to_a_step(tmp_path, capsys):
    options = ["--trainer", "--models", "bert", "--layers", "1", "--hidden_size", "64", "--vocab_size", "50",
               "--seq_length", "8", "--batch_size", "4", "--repeats", "3", "--device", "cpu"]  # fmt: skip
    assert main([*options, "--output", str(tmp_path / "bench.json")]) == 0
    (result,) = json.loads((tmp_path / "bench.json").read_text())["models"].values()
    assert result["plain_seconds"] > 0 and result["trimming_seconds"] > 0
    assert result["ratio_low"] <= result["ratio"] <= result["ratio_high"]
    assert "TrimmingTrainer at p = 1" in capsys.readouterr().out
