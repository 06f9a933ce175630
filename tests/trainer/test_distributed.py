"""Several processes train as one: taking turns at its mini-batches, or taking parts of them; and remember as one."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.support.distributed import GLOBAL, REMEMBERED, REMEMBERED_ROWS, TRAININGS, run, run_global
from tests.support.heads import make
from tests.support.helpers import digits, relative_difference, tiny_vit, weights
from tests.trainer.test_memory import own_losses


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


def table(folder, case, rank=0):
    return dict(np.load(folder / f"{case}-{rank}.npz"))


@pytest.mark.parametrize("case", REMEMBERED)
def test_processes_remember_the_same(case, together):
    first, second = table(together, case), table(together, case, 1)
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    seen = 2 * (REMEMBERED_ROWS if "less" in case else 48)  # whole mini-batches of 8 for both
    assert first["seen"].sum() == seen and first["seen"].min() == 2
    assert 0 < first["kept"].sum() < seen
    if "read" not in case:
        losses = own_losses(tiny_vit(), digits(REMEMBERED_ROWS))
        np.testing.assert_allclose(first["last_loss"], losses, rtol=2e-5)
        np.testing.assert_allclose(first["mean_loss"], losses, rtol=2e-5)


def test_processes_choose_the_same_samples_of_the_data_set(together):
    first, second = (json.loads((together / f"dataset-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    # Mini-batches of 16 for both; a whole epoch is filled up with the first samples.
    assert [len(drawn) for drawn in first["drawn"]] == [REMEMBERED_ROWS, 32, 16, REMEMBERED_ROWS]
    assert first["steps"] == 3 + 2 + 1 + 3
    assert sum(first["seen"]) == 48 + 32 + 16 + 48


def test_when_processes_tell_each_other_does_not_matter(together):
    often, once = table(together, "read often"), table(together, "read once")
    assert all(often[name].tobytes() == once[name].tobytes() for name in often)
    assert often["loss_std"].min() > 0


def test_a_process_that_loads_for_all_is_refused(together):
    for rank in (0, 1):
        assert "leave dispatch_batches out" in (together / f"refused-{rank}.txt").read_text()
