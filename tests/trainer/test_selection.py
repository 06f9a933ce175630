"""The number k of kept items, and which they are."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_trim import select_items
from hf_trim.trainer.selection import num_kept


@given(st.floats(0.001, 1.0), st.integers(0, 300))
def test_number_of_kept_items(keep, n):
    k = num_kept(keep, n)
    assert k == (0 if n == 0 else max(1, round(keep * n)))
    assert 0 <= k <= n


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=12).flatmap(
        lambda losses: st.tuples(st.just(losses), st.lists(st.booleans(), min_size=len(losses), max_size=len(losses)))
    ),
    st.floats(0.01, 1.0),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_hardest_items_ties_by_position(losses_and_valid, keep, dtype):
    losses, valid = losses_and_valid
    candidates = [i for i in range(len(losses)) if valid[i]]
    expected = sorted(sorted(candidates, key=lambda i: (-losses[i], i))[: num_kept(keep, len(candidates))])
    kept = select_items(torch.tensor(losses, dtype=dtype), keep, valid=torch.tensor(valid))
    assert kept.tolist() == expected


def test_random_items_are_valid_and_repeatable():
    losses, valid = torch.rand(4, 6), torch.rand(4, 6) > 0.4
    draw = lambda seed: select_items(  # noqa: E731
        losses, 0.5, valid=valid, select="random", generator=torch.Generator().manual_seed(seed)
    )
    assert torch.equal(draw(1), draw(1))
    assert any(not torch.equal(draw(1), draw(seed)) for seed in range(2, 6))
    assert valid.flatten()[draw(1)].all()
    assert len(draw(1)) == num_kept(0.5, int(valid.sum()))
