"""A sample of what `python -m tests.support.opinfo` does: every eighteenth op, a few compiled, one sample of each."""

import pytest
import torch

from hf_trim.backward.registry import PROOF
from tests.support.opinfo import COMPILED, CRASH, EAGER, EXACT, WRONG, dtypes_of, op_db, runs


OPS = [op for op in op_db[4::9] if dtypes_of(op)]
HALF = [pytest.param(op, marks=[pytest.mark.extended] * (number % 2)) for number, op in enumerate(OPS)]
FOURTH = [pytest.param(op, marks=[pytest.mark.extended] * (number % 4 > 0)) for number, op in enumerate(OPS[::4])]


def outcomes(op, calls):
    found = set()
    for dtype in dtypes_of(op):
        for call, bits in calls:
            for run in runs(op, dtype, call, bits, most=1):
                assert run.outcome not in (WRONG, CRASH), (dtype, call, bits, run)
                found.add(run.outcome)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", HALF, ids=lambda op: op.formatted_name)
def test_op(op, monkeypatch):
    monkeypatch.setattr("hf_trim.backward.eager.saved.MIN_ELEMENTS", 0)
    outcomes(op, EAGER.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", FOURTH, ids=lambda op: op.formatted_name)
def test_compiled_op(op):
    outcomes(op, COMPILED.values())


def test_the_oracle_sees_a_lost_conjugate(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "conj_physical", lambda x: x)
    (mm,) = [op for op in op_db if op.name == "mm"]
    assert WRONG in {run.outcome for run in runs(mm, torch.cdouble)}


@pytest.mark.extended
def test_the_oracle_sees_a_wrong_proof(monkeypatch):
    (flip,) = [op for op in op_db if op.name == "flip"]
    call, _ = COMPILED[", for inductor"]
    assert {run.outcome for run in runs(flip, torch.double, call)} >= {EXACT}
    monkeypatch.setitem(PROOF, "rev", lambda prop, name, shape, x, dims: prop.result(shape, x.row_dim, x, x.zeros))
    assert WRONG in {run.outcome for run in runs(flip, torch.double, call)}
