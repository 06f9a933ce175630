"""Random programs have the dense gradients, whatever they do with the rows of a batch."""

import pytest

from hf_trim.backward.settings import fallback_report, refused_graphs
from tests.support.programs import HEADS, MIXING, ROW_BY_ROW, difference, draw_program


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_row_by_row(name):
    assert difference([ROW_BY_ROW[name]], HEADS["mean"], seed=0) < 1e-10
    assert not fallback_report()


@pytest.mark.parametrize("name", MIXING)
def test_mixing(name):
    assert difference([MIXING[name]], HEADS["flat"], seed=0) < 1e-10


def test_random_programs():
    for seed in range(300):
        assert difference(*draw_program(seed), seed) < 1e-10, seed


@pytest.mark.extended
def test_random_programs_compiled(fresh_compiler):
    """Each is proved or refused, with no check of the result."""
    refused = 0
    for seed in range(6):
        assert difference(*draw_program(seed), seed, compiled=True) < 1e-10, seed
        refused += bool(refused_graphs())
    assert 0 < refused < 6
