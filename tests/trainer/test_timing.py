"""`trim_backward="auto"` times the dense and the row-sparse backward pass, and keeps the faster one."""

import pytest
import torch

from hf_trim.trainer import timing
from tests.support.helpers import digits, relative_difference, tiny_vit, train, weights


ARGUMENTS = {"trim_keep_start": 0.75, "trim_keep_end": 0.25, "trim_schedule": "step", "num_train_epochs": 5}


@pytest.fixture
def clock(monkeypatch):
    """A clock by which a backward pass takes the milliseconds of its mode; and the modes of the steps."""

    class Clock:
        milliseconds = {"dense": 20.0, "sparse": 30.0}
        modes, now = [], 0.0

        def __call__(self):
            return self.now

    monkeypatch.setattr(timing, "TRIAL_STEPS", 8)
    clock, choose, measure = Clock(), timing.BackwardTiming.choose, timing.BackwardTiming._wait

    def chosen(self, state, p):
        result = choose(self, state, p)
        self.mode_now = result[0]
        if not clock.modes or clock.modes[-1][0] != state.global_step:
            clock.modes.append((state.global_step, result[0], p))
        return result

    def wait(device):  # is called before and after the backward pass
        clock.now += clock.milliseconds[clock.modes[-1][1]] / 1000
        return measure(device)

    monkeypatch.setattr(timing, "perf_counter", clock)
    monkeypatch.setattr(timing.BackwardTiming, "choose", chosen)
    monkeypatch.setattr(timing.BackwardTiming, "_wait", staticmethod(wait))
    return clock


def test_the_faster_one_is_kept(clock, tmp_path, caplog):
    clock.milliseconds = {"dense": 30.0, "sparse": 20.0}
    ours = train(tiny_vit(), digits(48), tmp_path, **ARGUMENTS)
    modes = [mode for _, mode, _ in clock.modes]
    assert modes == ["dense", "sparse"] * 4 + ["sparse"] * 22
    assert "Trimmed batches use the sparse backward pass: it takes 20 ms, and the dense one 30 ms" in caplog.text
    dense = train(tiny_vit(), digits(48), tmp_path, trim_backward="dense", **ARGUMENTS)
    assert ours.losses == pytest.approx(dense.losses, rel=1e-5)
    assert relative_difference(weights(ours), weights(dense)) < 1e-5


def test_it_looks_again_when_p_has_fallen_by_a_quarter(clock, tmp_path, caplog):
    train(tiny_vit(), digits(48), tmp_path, **ARGUMENTS)
    modes = [mode for _, mode, _ in clock.modes]
    first_p = clock.modes[7][2]  # of the step in which the first trial ended
    again = next(i for i, (_, _, p) in enumerate(clock.modes) if p <= 0.75 * first_p)
    assert modes[:8] == ["dense", "sparse"] * 4 and set(modes[8:again]) == {"dense"}
    assert modes[again : again + 8] == ["dense", "sparse"] * 4
    # Each choice is told once, though the second trial found other times.
    assert caplog.text.count("Trimmed batches use the dense backward pass: it takes 20 ms, and the sparse one") == 1


SCHEDULES = {"step": ARGUMENTS, "adaptive": {"trim_schedule": "adaptive", "trim_mass": 0.5, "num_train_epochs": 5}}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_resumed_training_repeats_the_choice(schedule, clock, tmp_path):
    arguments = {**SCHEDULES[schedule], "save_strategy": "steps", "save_steps": 5}
    whole = train(tiny_vit(), digits(48), tmp_path, **arguments)
    modes = clock.modes
    for checkpoint in (5, 15):  # in a trial, and after one
        clock.modes = []
        clock.milliseconds = {"dense": 20.0, "sparse": 30.0}
        resumed = train(
            tiny_vit(), digits(48), tmp_path, resume=str(tmp_path / f"checkpoint-{checkpoint}"), **arguments
        )
        assert clock.modes == [entry for entry in modes if entry[0] >= checkpoint]
        assert resumed.losses == whole.losses[checkpoint:] and torch.equal(weights(resumed), weights(whole))


def test_accumulated_mini_batches_are_one_step(clock, tmp_path):
    train(tiny_vit(), digits(48), tmp_path, gradient_accumulation_steps=3, **ARGUMENTS)
    assert [mode for _, mode, _ in clock.modes] == ["dense", "sparse"] * 4 + ["dense"] * 2


@pytest.mark.parametrize("arguments", [{"full_determinism": True}, {"trim_backward": "sparse"}], ids=str)
def test_no_clock_where_the_result_shall_not_depend_on_it(arguments, clock, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.trainer.enable_full_determinism", lambda seed: None)  # it sets globals of torch
    train(tiny_vit(), digits(48), tmp_path, **{**ARGUMENTS, "num_train_epochs": 1, **arguments})
    assert not clock.modes
