"""The script for a machine with a GPU, at toy size on the CPU; and what it does when a case breaks its process."""

import json
import signal
import subprocess
import sys

import pytest
import torch

from hf_trim.bench.arguments import BenchArguments
from tests.support import gpu_cases
from tests.support.gpu import exactness, speed, training
from tests.support.gpu.__main__ import PARTS, main, run_cases
from tests.support.gpu.process import OUT_OF_MEMORY, CaseProcess, Settings
from tests.support.gpu.table import make_tables


def test_a_case_that_breaks_costs_the_others_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(PARTS, "speed", 0.0)
    content = run_cases(Settings(str(tmp_path), True, None), minutes=8.0, target=gpu_cases.work)
    assert json.loads((tmp_path / "gpu.json").read_text()) == content
    cases = content["parts"]["exactness"]
    expected = ["unavailable", "out of memory", "failed", "failed", "failed", "passed"]
    assert [case["status"] for case in cases.values()] == expected
    assert cases["out of memory"]["problem"] == "Tried to allocate 2 GiB"
    assert cases["error"]["problem"].startswith("Traceback") and "KeyError: 'a'" in cases["error"]["problem"]
    assert f"ended with {-signal.SIGSEGV}" in cases["crash"]["problem"]
    assert {case["status"] for case in content["parts"]["speed"].values()} == {"cut off"}
    tables = make_tables(content)
    assert "- exactness: 1 unavailable, 1 out of memory, 3 failed, 1 passed\n- speed: 2 cut off" in tables
    assert "| wrong | **failed**: gradients differ | 5e-01 | 1e-04 | 0 |" in tables
    assert "| right | passed | 3.00 | 1.00 | 100, 20 % |" in tables
    assert torch.OutOfMemoryError.__name__ == OUT_OF_MEMORY


def test_a_case_that_takes_too_long_is_cut_off(tmp_path):
    process = CaseProcess(Settings(str(tmp_path), True, None), gpu_cases.work)
    process.start(60)
    cut_off = process.run("speed", "endless", 0.2)
    assert (cut_off["status"], cut_off["problem"]) == ("cut off", "it was not finished after 0 s")
    assert process.run("exactness", "right", 60) == {"status": "passed", **gpu_cases.RIGHT}
    assert process.end() == 0


def test_a_process_that_does_not_start_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="ended while it started"):
        CaseProcess(Settings(str(tmp_path), True, None), gpu_cases.end_at_once).start(60)


def test_wrong_gradients_fail(monkeypatch):
    assert "problem" not in exactness.model_case("bert", "float32", "cpu")
    take = exactness.take_rows_sparse
    monkeypatch.setattr(exactness, "take_rows_sparse", lambda losses, kept: take(losses, kept.roll(1) - 1))
    assert "gradients differ by" in exactness.model_case("bert", "float32", "cpu")["problem"]


def test_cases_for_a_gpu_have_arguments_that_the_benchmark_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for case in speed.make_cases("cuda").values():
        BenchArguments(**case.args[0])
    names = {*exactness.make_cases("cuda"), *training.make_cases("cuda", str(tmp_path), None)}
    assert len(names) > 100 and "resnet18, digits-resnet, adaptive" in names


@pytest.mark.parametrize(
    "options, message",
    [
        (["--minutes", "0"], "--minutes must be more than 0"),
        (["--data", "{folder}"], "has no train-images-idx3-ubyte.gz"),
        ([], "has the results of another run"),
        (["--toys"], "--toys"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, options, message):
    (tmp_path / "gpu.json").write_text("{}")
    with pytest.raises(SystemExit) as exit:
        main(["--output", str(tmp_path), *(option.format(folder=tmp_path) for option in options)])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.extended
def test_as_a_user_runs_it(tmp_path):
    command = [sys.executable, "-m", "tests.support.gpu", "--output", str(tmp_path / "out")]
    if not torch.cuda.is_available():
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and "torch finds no CUDA device" in done.stderr
    done = subprocess.run([*command, "--toy"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "out" / "gpu.json").read_text())
    for part, cases in content["parts"].items():
        statuses = {case["status"] for case in cases.values()}
        assert "passed" in statuses and statuses <= {"passed", "unavailable"}, part
    assert (tmp_path / "out" / "gpu.md").read_text() in done.stdout
