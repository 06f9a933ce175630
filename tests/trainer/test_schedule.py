"""The fraction p of items to keep, as training goes on."""

import pytest

from hf_trim.trainer.schedule import keep_fraction, linear_fraction, schedule_unit


def test_fraction_falls_linearly_from_the_first_to_the_last_epoch():
    fractions = [linear_fraction(epoch, 5, 1.0, 0.2) for epoch in range(5)]
    assert fractions == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert linear_fraction(1, 2, 1.0, 0.3) == 0.3 and linear_fraction(7, 5, 1.0, 0.3) == 0.3
    assert linear_fraction(0, 1, 0.9, 0.2) == 0.9


def test_fraction_is_constant_within_an_epoch_and_counts_a_part_of_one():
    arguments = {"num_epochs": 2.5, "step": 0, "num_steps": 0}
    fractions = [
        keep_fraction(1.0, 0.2, "epoch", epoch=epoch, **arguments) for epoch in (0.0, 0.99, 1.0, 1.5, 2.0, 2.4)
    ]
    assert fractions == pytest.approx([1.0, 1.0, 0.6, 0.6, 0.2, 0.2])


@pytest.mark.parametrize(
    "asked, epochs, max_steps, unit",
    [("epoch", 3, -1, "epoch"), ("epoch", 1, -1, "step"), ("epoch", 3, 100, "step"), ("step", 3, -1, "step")],
)
def test_schedule_unit(asked, epochs, max_steps, unit):
    assert schedule_unit(asked, epochs, max_steps) == unit
