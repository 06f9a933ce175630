"""
Statistics of the measured times.

Seconds of forward and backward, round by round → medians, speed-ups over the dense backward pass, their bounds, and
the speed-up that they predict for a schedule of p.
"""

from statistics import mean, median, quantiles

import numpy as np

from hf_trim.bench.steps import COMPILED, UNTRIMMED, StepKind
from hf_trim.trainer.schedule import linear_fraction
from hf_trim.trainer.selection import num_kept


SCHEDULE = (1.0, 0.2)  # the paper's


def bound_speedup(mode: str, kept_fraction: float, forward: float, backward: float) -> float:
    """
    Compute the highest speed-up over a dense step that a backward pass can have: that of one which shrinks with p as a
    whole. The same holds with gradient checkpointing: there the dense backward pass contains the second forward pass,
    b = f + b'.

    Args:
        mode (`str`): `"untrimmed"`, `"dense"`, `"sparse"` or `"replay"`, of the compiled model or not.
        kept_fraction (`float`): k / B.
        forward (`float`): Time f of the forward pass.
        backward (`float`): Time b of the dense backward pass, with what it recomputes.

    Returns:
        `float`: (f + b) / (f + p·b) for sparse, (f + b) / (f + p·(f + b)) for replay, 1 for dense.
    """
    dense, mode = forward + backward, mode.removeprefix(COMPILED)
    if mode == "sparse":
        return dense / (forward + kept_fraction * backward)
    if mode == "replay":
        return dense / (forward + kept_fraction * dense)
    return 1.0


def measure_spread(values: list[float]) -> dict[str, float]:
    """
    Args:
        values (`list[float]`): At least one number.

    Returns:
        `dict[str, float]`: `median` and `iqr` (the interquartile range; 0 for a single number).
    """
    quartiles = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [0.0, 0.0, 0.0]
    return {"median": median(values), "iqr": quartiles[2] - quartiles[0]}


def summarize(seconds: dict[StepKind, list[tuple[float, float]]], batch_size: int) -> tuple[dict, list[dict]]:
    """
    Args:
        seconds (`dict[StepKind, list[tuple[float, float]]]`): Seconds of forward and backward, round by round.
        batch_size (`int`): Samples a step.

    Returns:
        `tuple[dict, list[dict]]`: Medians of the dense `forward` and `backward` (of all p, and untrimmed) in seconds,
        `compiled_forward` and `compiled_backward` if measured; and for each kind of step its times, its speed-ups and
        its bound.
    """
    dense = {compiled: _dense_medians(seconds, compiled) for compiled in {kind.is_compiled for kind in seconds}}
    rows = []
    for kind, times in seconds.items():
        k = num_kept(kind.keep, batch_size)
        limit = bound_speedup(kind.mode, k / batch_size, **dense[kind.is_compiled])
        speedup = _compute_speedup(seconds[kind.reference], times)
        rows.append(
            {
                "mode": kind.mode,
                "keep": kind.keep,
                "k": k,
                "kept_fraction": k / batch_size,
                "forward": measure_spread([f for f, _ in times]),
                "backward": measure_spread([b for _, b in times]),
                "step": measure_spread([f + b for f, b in times]),
                "speedup_to_dense": speedup,
                "speedup_to_untrimmed": _compute_speedup(seconds[UNTRIMMED], times),
                "bound": limit,
                "fraction_of_bound": speedup / limit,
                "rounds": times,
            }
        )
    compiled = {f"compiled_{name}": value for name, value in dense.get(True, {}).items()}
    return {**dense[False], **compiled}, rows


def _dense_medians(seconds: dict[StepKind, list[tuple[float, float]]], compiled: bool) -> dict[str, float]:
    """Medians of forward and backward over all steps with a dense backward pass."""
    times = [
        pair
        for kind, rounds in seconds.items()
        if kind.backward in ("untrimmed", "dense") and kind.is_compiled == compiled
        for pair in rounds
    ]
    return {"forward": median(f for f, _ in times), "backward": median(b for _, b in times)}


def _compute_speedup(reference: list[tuple[float, float]], times: list[tuple[float, float]]) -> float:
    """The median of the ratios within a round, so that a round in which the machine was slow does not count more."""
    return median(sum(slow) / sum(fast) for slow, fast in zip(reference, times, strict=True))


def predict_schedule_speedup(rows: list[dict], epochs: int) -> dict[str, float]:
    """
    Predict the speed-up of a training run with p falling from 1.0 to 0.2, without optimizer and data.

    Args:
        rows (`list[dict]`): What [`summarize`] returned for one model.
        epochs (`int`): Number of epochs; p falls linearly from the first to the last.

    Returns:
        `dict[str, float]`: Speed-up over untrimmed training, per mode; empty unless both ends were measured. Between
        the measured p the time is interpolated; an epoch with p = 1 is untrimmed.
    """
    start, end = SCHEDULE
    fractions = [linear_fraction(epoch, epochs, start, end) for epoch in range(epochs)]
    speedups = {}
    for mode in dict.fromkeys(row["mode"] for row in rows if row["mode"] != "untrimmed"):
        times = {row["keep"]: 1 / row["speedup_to_untrimmed"] for row in rows if row["mode"] == mode}
        if min(times) > end or max(times) < start:
            return {}
        keep = sorted(times)
        predicted = [1.0 if p == 1 else float(np.interp(p, keep, [times[k] for k in keep])) for p in fractions]
        speedups[mode] = 1 / mean(predicted)
    return speedups
