"""Two processes that take turns at the mini-batches train as one that accumulates them."""

import json
import subprocess
import sys

import pytest
import torch

from tests.distributed import TRAININGS, run
from tests.helpers import relative_difference, weights
from tests.test_heads import make


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.distributed"]
    done = subprocess.run([sys.executable, *command, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("keep", [0.3, 1.0])
@pytest.mark.parametrize("head", TRAININGS)
def test_two_processes_train_as_one(head, keep, two_processes, tmp_path):
    losses, alone = run(head, tmp_path, 1, keep)
    together = torch.load(two_processes / f"{head}-{keep}.pt")
    start = weights(make(head))
    assert relative_difference(together - start, alone - start) < 1e-4
    assert json.loads((two_processes / f"{head}-{keep}.json").read_text()) == pytest.approx(losses, rel=1e-4)
