"""Two processes under each engine of accelerate, with the package's configurations, train as one process alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.engines import CASES, run
from tests.support.heads import make
from tests.support.helpers import relative_difference


CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"
ENGINES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
assert ENGINES == ["ddp", "fsdp2", "zero1", "zero2", "zero3"]


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    command = [*launcher, "--config_file", str(CONFIGS / f"{request.param}.yaml")]
    done = subprocess.run(
        [*command, "--num_processes", "2", "-m", "tests.support.engines", str(folder)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return request.param, folder


def saved(folder):
    return torch.cat([value.flatten() for _, value in sorted(load_file(folder / "model.safetensors").items())])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    losses = {case: run(case, folder, 1).losses for case in CASES}
    for case in CASES:
        make(CASES[case][0]).save_pretrained(folder / f"{case}, start")
    return folder, losses


@pytest.mark.parametrize("case", CASES)
def test_an_engine_trains_as_one_process_alone(case, engine, alone):
    (name, folder), (reference, losses) = engine, alone
    found = json.loads((folder / case / "found.json").read_text())
    assert found["engine"] == name
    start = saved(reference / f"{case}, start")
    assert relative_difference(saved(folder / case) - start, saved(reference / case) - start) < 1e-6
    assert found["losses"] == pytest.approx(losses[case], rel=1e-5)
    mode = {"tokens": "dense", "everything": None, "replay": "replay"}.get(case, "sparse")
    assert [each for each, _ in found["told"]] == ([mode] if mode else [])
