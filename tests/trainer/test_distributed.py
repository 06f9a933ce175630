"""Several processes train as one: taking turns at its mini-batches, or taking parts of them."""

import json
import subprocess
import sys

import pytest
import torch

from tests.support.distributed import GLOBAL, TRAININGS, run, run_global
from tests.support.heads import make
from tests.support.helpers import relative_difference, weights


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder with what two processes learned, and three."""
    folder = tmp_path_factory.mktemp("together")
    command = [sys.executable, "-m", "tests.support.distributed", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def check(folder, name, head, losses, alone):
    together = torch.load(folder / f"{name}.pt")
    start = weights(make(head))
    assert relative_difference(together - start, alone - start) < 1e-4
    assert json.loads((folder / f"{name}.json").read_text()) == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("keep", [0.3, 1.0])
@pytest.mark.parametrize("head", TRAININGS)
def test_processes_that_take_turns_train_as_one(head, keep, together, tmp_path):
    check(together, f"{head}-{keep}", head, *run(head, tmp_path, 1, keep))


@pytest.mark.parametrize("case", GLOBAL)
def test_processes_choose_among_all_items_as_one(case, together, tmp_path):
    check(together, case, GLOBAL[case][0], *run_global(case, tmp_path, 1))
