"""Medians, speed-ups and bounds are those of the measured times."""

import pytest

from hf_trim.bench.steps import UNTRIMMED, StepKind
from hf_trim.bench.summary import bound_speedup, measure_spread, predict_schedule_speedup, summarize


def test_bounds():
    assert bound_speedup("dense", 0.2, 1.0, 2.0) == bound_speedup("untrimmed", 1.0, 1.0, 2.0) == 1
    assert bound_speedup("sparse", 0.2, 1.0, 2.0) == pytest.approx(3 / 1.4)
    assert bound_speedup("replay", 0.2, 1.0, 2.0) == pytest.approx(3 / 1.6)
    # With gradient checkpointing b = f + b': 2f + b' over f + p·(f + b').
    assert bound_speedup("sparse", 0.25, 1.0, 1.0 + 2.0) == pytest.approx(4 / 1.75)


def test_spread():
    assert measure_spread([1.0, 2.0, 3.0, 4.0, 10.0]) == {"median": 3.0, "iqr": 2.0}
    assert measure_spread([7.0]) == {"median": 7.0, "iqr": 0.0}


SECONDS = {
    UNTRIMMED: [(1.0, 2.0), (2.0, 4.0), (1.0, 2.0)],
    StepKind("dense", 0.2): [(1.0, 2.0), (2.0, 4.0), (1.0, 2.0)],
    StepKind("sparse", 0.2): [(1.0, 0.5), (2.0, 1.0), (1.0, 1.0)],  # the second round is slow for all
    StepKind("dense", 1.0): [(1.0, 2.0), (2.0, 4.0), (1.0, 2.0)],
    StepKind("sparse", 1.0): [(1.0, 2.0), (2.0, 4.0), (1.0, 2.0)],
}


def test_summary_compares_within_a_round():
    dense, rows = summarize(SECONDS, batch_size=10)
    assert dense == {"forward": 1.0, "backward": 2.0}
    row = rows[2]
    assert (row["mode"], row["keep"], row["k"]) == ("sparse", 0.2, 2)
    assert row["speedup_to_dense"] == row["speedup_to_untrimmed"] == 2.0
    assert row["fraction_of_bound"] == pytest.approx(2.0 / (3 / 1.4))


def test_schedule():
    _, rows = summarize(SECONDS, batch_size=10)
    # p = 1, 0.6, 0.2 take 1, 0.75 (interpolated) and 0.5 of a plain epoch.
    assert predict_schedule_speedup(rows, epochs=3) == {"dense": pytest.approx(1.0), "sparse": pytest.approx(1 / 0.75)}
    assert predict_schedule_speedup([row for row in rows if row["keep"] == 1], epochs=3) == {}
