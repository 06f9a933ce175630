"""A sample of what `python -m tests.support.opinfo` does: every eighteenth op, and one sample of each."""

import pytest
import torch

from tests.support.opinfo import CRASH, WRONG, dtypes_of, op_db, runs


OPS = [op for op in op_db[4::9] if dtypes_of(op)]
HALF = [pytest.param(op, marks=[pytest.mark.extended] * (number % 2)) for number, op in enumerate(OPS)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", HALF, ids=lambda op: op.formatted_name)
def test_op(op, monkeypatch):
    monkeypatch.setattr("hf_trim.backward.eager.saved.MIN_ELEMENTS", 0)
    for dtype in dtypes_of(op):
        for bits in (False, True):
            faults = [about for outcome, about in runs(op, dtype, bits, most=1) if outcome in (WRONG, CRASH)]
            assert not faults, (dtype, bits, faults)


def test_the_oracle_sees_a_lost_conjugate(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "conj_physical", lambda x: x)
    (mm,) = [op for op in op_db if op.name == "mm"]
    assert WRONG in {outcome for outcome, _ in runs(mm, torch.cdouble)}
