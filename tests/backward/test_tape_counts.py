"""
A tape holds for all numbers k of kept rows, and has the gradients of the dense backward pass for each.

e.g. k = 2, 3, 4, 2: step 1 is met, steps 2 and 3 are recorded, and step 4 is compared with the engine.
"""

from functools import partial

import pytest
import torch

from hf_trim.backward import take_rows_sparse, taped
from hf_trim.backward.tape import counts as row_counts
from hf_trim.backward.tape import recorder, tapes
from tests.support.taped import B, Net, inputs, kept_in, run


def test_one_tape_for_all_numbers_of_kept_rows(counts):
    """One row alone has another layout in memory, and a tape of its own."""
    net = Net()
    ks = (2, 3, 4, 2, 3, 4, 4, 2)
    run(lambda step: net(inputs(step)), net.parameters(), len(ks), ks=ks)
    assert counts == {"recorded": 2, "compared": 1, "ran": 4}  # step 1 is met, 2 and 3 are recorded, 4 compared
    run(lambda step: net(inputs(step)), net.parameters(), 6, ks=(1, 3))
    assert counts == {"recorded": 3, "compared": 2, "ran": 7}


def test_numbers_of_kept_rows_that_fall(counts):
    """As in the paper's schedule: each number comes many times before the next one does."""
    net = Net()
    ks = 5 * (4,) + 5 * (3,) + 5 * (2,)
    run(lambda step: net(inputs(step)), net.parameters(), len(ks), ks=ks)
    assert counts == {"recorded": 2, "compared": 3, "ran": 9}


def test_numbers_of_kept_rows_and_lengths(counts):
    net = Net()
    run(lambda step: net(inputs(step)[:, : 2 + step % 2]), net.parameters(), steps=16, ks=(2, 2, 3, 3, 4, 4))
    assert counts == {"recorded": 4, "compared": 2, "ran": 8}


def test_all_rows_are_kept(counts):
    net, calls = Net(), []
    for step in range(8):
        kept = kept_in(step, k=(3, B, 4, B)[step % 4])
        grads = []
        for take in (torch.Tensor.__getitem__, partial(take_rows_sparse, dense_above=1.0)):
            net.zero_grad()
            torch.manual_seed(step)
            with taped():
                take(net(inputs(step)), kept).sum().backward()
            grads.append([p.grad for p in net.parameters()])
        torch.testing.assert_close(*grads)
        calls.append(counts["ran"])
    assert calls[-1]


def test_a_recording_that_differs_in_more(counts, monkeypatch):
    """Then each number of kept rows has a tape of its own."""
    monkeypatch.setattr(tapes, "for_any_count", lambda *_: None)
    net = Net()
    run(lambda step: net(inputs(step)), net.parameters(), 12, ks=(2, 3, 4))
    assert counts == {"recorded": 3, "compared": 3, "ran": 4}


@pytest.mark.parametrize(
    "function, wrong, found",
    [
        ("_per_row", lambda n, m, ks: n, "RuntimeError in the comparison"),
        ("_joined_argument", lambda a, *rest: _halved(a) or joined_argument(a, *rest), "another gradient"),
    ],
    ids=["sizes", "values"],
)
def test_a_wrong_tape_for_all_numbers_is_not_used(function, wrong, found, counts, monkeypatch):
    """What is wrong comes out with the first number of kept rows that was not recorded."""
    monkeypatch.setattr(row_counts, function, wrong)
    net = Net()
    run(lambda step: net(inputs(step)), net.parameters(), 8, ks=(2, 2, 2, 2, 3, 4, 3, 4))
    assert counts == {"recorded": 2, "compared": 1, "ran": 1, found: 1}


joined_argument = row_counts._joined_argument


def _halved(argument):
    return ("constant", argument[1] / 2) if isinstance(argument[-1], float) else None


def test_recordings_that_can_be_joined():
    def program(*constants, expected=None):
        op = ("aten::op", "", tuple(("constant", x) for x in constants), ((0,),), (), expected)
        return recorder.Program([op], 1, 0, 0, [], [(0, 1)])

    def joined(first, second):
        both = row_counts.for_any_count(first, second, (2, 3))
        return None if both is None else (both.ops[0][2], both.ops[0][-1])

    assert joined(program([2, 5, 8], 0), program([3, 5, 8], 0)) == (
        (("counted", [(1,), 5, 8]), ("constant", 0)), None
    )  # fmt: skip
    assert joined(program(10), program(15)) == ((("counted", [(5,)]),), None)
    assert joined(program(expected=[[(2, 1)], True]), program(expected=[[(3, 1)], True])) == (
        (), [[[(1,), 1]], True]
    )  # fmt: skip
    for a, b in [(2.0, 3.0), (1, 1.0), (1, True), (4, 9), (5, 6), ([2, 5], [3]), ([2], 3), ("2", "3"), (None, 3)]:
        assert joined(program(a), program(b)) is None, (a, b)
    assert joined(program(expected=[14]), program(expected=[21])) == ((), [(7,)])  # a number that the host reads
    assert joined(program(expected=[14]), program(expected=[22])) is None
    assert joined(program(expected=None), program(expected=[3])) is None
    assert joined(program(2), program(3)._replace(results=[(-1, 0)])) is None
