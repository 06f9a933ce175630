"""The benchmark runs end to end, its bounds are right, and it refuses what it does not understand."""

import json

import pytest
import torch

from hf_trim.bench.steps import (
    UNTRIMMED,
    Cell,
    Steps,
    bound,
    main,
    peak_memory,
    schedule_speedup,
    spread,
    summarize,
)


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
        cells = {(cell["mode"], cell["keep"]): cell for cell in result["cells"]}
        modes = ("dense", "sparse", "replay")
        assert set(cells) == {("untrimmed", 1.0), *((mode, keep) for mode in modes for keep in (0.34, 1.0))}
        assert not any(cell["fallbacks"] for cell in cells.values())
        assert all(cell["peak_memory_bytes"] > 0 for cell in cells.values())
        assert cells["sparse", 0.34]["kept_fraction"] == pytest.approx(2 / 6)
        assert 0 < cells["sparse", 0.34]["gradient_error"] <= 1e-5  # 0 would be the same pass twice
        replay_error = cells["replay", 0.34]["gradient_error"]
        # With dropout (BERT's own 0.1) replay draws other masks, and there is nothing to compare with.
        assert replay_error is None if name == "bert" and not extra else replay_error <= 1e-5
        expected = bound("sparse", 2 / 6, **result["dense_seconds"])
        assert cells["sparse", 0.34]["bound"] == pytest.approx(expected)
        assert len(cells["sparse", 0.34]["rounds"]) == 2


def test_compiled_models(tmp_path):
    output = tmp_path / "bench.json"
    assert main([*TINY, "--models", "vit", "--keep", "0.5", "--modes", "sparse", "replay", "--repeats", "2",
                 "--device", "cpu", "--torch_compile", "--dropout", "0", "--output", str(output)]) == 0  # fmt: skip
    result = json.loads(output.read_text())["models"]["vit"]
    cells = {cell["mode"]: cell for cell in result["cells"]}
    modes = ["dense", "sparse", "replay"]
    assert list(cells) == ["untrimmed", *modes, *(f"compiled {mode}" for mode in modes)]
    assert not any(cell["fallbacks"] for cell in cells.values())
    assert 0 < cells["compiled sparse"]["gradient_error"] <= 1e-5
    assert cells["compiled replay"]["gradient_error"] <= 1e-5
    dense = result["dense_seconds"]
    for mode in ("sparse", "replay"):
        expected = bound(mode, 0.5, dense["compiled_forward"], dense["compiled_backward"])
        assert cells[f"compiled {mode}"]["bound"] == pytest.approx(expected)
    assert cells["compiled dense"]["first_seconds"] > cells["compiled sparse"]["first_seconds"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "convnext", "gpt2-lm", "lm-head"])
def test_other_models(tmp_path, name):
    output = tmp_path / "bench.json"
    assert main([*TINY, "--models", name, "--keep", "0.5", "--modes", "sparse", "--repeats", "1", "--device", "cpu",
                 "--dtype", "bfloat16", "--output", str(output)]) == 0  # fmt: skip
    untrimmed, dense, sparse = json.loads(output.read_text())["models"][name]["cells"]
    assert (untrimmed["mode"], dense["mode"], sparse["mode"]) == ("untrimmed", "dense", "sparse")
    assert sparse["gradient_error"] < 0.05
    assert not sparse["fallbacks"]


def test_bounds():
    assert bound("dense", 0.2, 1.0, 2.0) == bound("untrimmed", 1.0, 1.0, 2.0) == 1
    assert bound("sparse", 0.2, 1.0, 2.0) == pytest.approx(3 / 1.4)
    assert bound("replay", 0.2, 1.0, 2.0) == pytest.approx(3 / 1.6)
    # With gradient checkpointing b = f + b': 2f + b' over f + p·(f + b').
    assert bound("sparse", 0.25, 1.0, 1.0 + 2.0) == pytest.approx(4 / 1.75)


def test_spread():
    assert spread([1.0, 2.0, 3.0, 4.0, 10.0]) == {"median": 3.0, "iqr": 2.0}
    assert spread([7.0]) == {"median": 7.0, "iqr": 0.0}


SECONDS = {
    UNTRIMMED: [(1.0, 2.0), (2.0, 4.0), (1.0, 2.0)],
    Cell("dense", 0.2): [(1.0, 2.0), (2.0, 4.0), (1.0, 2.0)],
    Cell("sparse", 0.2): [(1.0, 0.5), (2.0, 1.0), (1.0, 1.0)],  # the second round is slow for all
    Cell("dense", 1.0): [(1.0, 2.0), (2.0, 4.0), (1.0, 2.0)],
    Cell("sparse", 1.0): [(1.0, 2.0), (2.0, 4.0), (1.0, 2.0)],
}


def test_summary_compares_within_a_round():
    dense, rows = summarize(SECONDS, batch_size=10)
    assert dense == {"forward": 1.0, "backward": 2.0}
    row = rows[2]
    assert (row["mode"], row["keep"], row["k"]) == ("sparse", 0.2, 2)
    assert row["speedup_to_dense"] == row["speedup_to_untrimmed"] == 2.0
    assert row["fraction_of_bound"] == pytest.approx(2.0 / (3 / 1.4))


def test_schedule():
    _, rows = summarize(SECONDS, batch_size=10)
    # p = 1, 0.6, 0.2 take 1, 0.75 (interpolated) and 0.5 of a plain epoch.
    assert schedule_speedup(rows, epochs=3) == {"dense": pytest.approx(1.0), "sparse": pytest.approx(1 / 0.75)}
    assert schedule_speedup([row for row in rows if row["keep"] == 1], epochs=3) == {}


def test_peak_memory():
    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1000))

        def forward(self, x):
            kept = x * self.weight  # 4 × 1000 floats, freed after exp, which saves its result
            return type("Output", (), {"logits": kept.exp()[:, :2]})

    batch = {"x": torch.ones(4, 1000), "labels": torch.zeros(4, dtype=torch.long)}
    peak = peak_memory(Steps(Scale(), batch, "float32"), UNTRIMMED)
    # Live at once in the backward pass: exp's result, its gradient and that of the product.
    assert 3 * 16000 <= peak < 3 * 16000 + 8000


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
    (found,) = json.loads((tmp_path / "bench.json").read_text())["models"].values()
    assert found["plain_seconds"] > 0 and found["trimming_seconds"] > 0
    assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]
    assert "TrimmingTrainer at p = 1" in capsys.readouterr().out
