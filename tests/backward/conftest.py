"""What the tests of the backward pass count and start afresh."""

import pytest
import torch
from torch._dynamo.utils import counters

from hf_trim.backward.eager import sparse
from hf_trim.backward.settings import reset_fallbacks
from hf_trim.backward.tape.extension import EXTENSION
from hf_trim.backward.tape.tapes import Tapes
from tests.support.observe import count_recomputations, record_graph_runs


@pytest.fixture
def recomputed(monkeypatch):
    """How many checkpoints recomputed the kept rows, and how many everything after an attempt."""
    return count_recomputations(monkeypatch)


@pytest.fixture
def fresh_compiler():
    """Nothing is compiled yet, and nothing counted."""
    torch._dynamo.reset()
    counters.clear()
    reset_fallbacks()
    yield
    torch._dynamo.reset()


@pytest.fixture
def runs(monkeypatch):
    """For each run of a compiled backward graph: the number of kept rows, and of those that it ran on (or `None`)."""
    return record_graph_runs(monkeypatch)


@pytest.fixture
def counts(monkeypatch):
    """What the tapes did, from none on."""
    if EXTENSION.get(wait=True) is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(sparse, "TAPES", Tapes())
    reset_fallbacks()
    return sparse.TAPES.counts
