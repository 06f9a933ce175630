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
# ZeRO 1 and 2 shard less than ZeRO 3, in the same code.
PARAMS = [pytest.param(x, marks=[pytest.mark.extended] * (x in ("zero1", "zero2"))) for x in ENGINES]


@pytest.fixture(scope="module")
def launched(request, tmp_path_factory):
    """The folder of what each engine trained that a selected test asks for."""
    folder = tmp_path_factory.mktemp("engines")
    tests = [item for item in request.session.items if "engine" in getattr(item, "fixturenames", ())]
    names = sorted({item.callspec.params["engine"] for item in tests})
    configs = [str(CONFIGS / f"{name}.yaml") for name in names]
    command = [sys.executable, "-m", "tests.support.engines", str(folder), *configs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.fixture(scope="module", params=PARAMS)
def engine(request, launched):
    error = launched / request.param / "error.txt"
    assert not error.exists(), error.read_text()[-5000:]
    return request.param, launched / request.param


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
    facts = json.loads((folder / case / "facts.json").read_text())
    assert facts["engine"] == name
    start = saved(reference / f"{case}, start")
    assert relative_difference(saved(folder / case) - start, saved(reference / case) - start) < 1e-6
    assert facts["losses"] == pytest.approx(losses[case], rel=1e-5)
    mode = {"tokens": "dense", "everything": None, "replay": None}.get(case, "sparse")  # of what was not asked for
    assert facts["warned"] == mode
