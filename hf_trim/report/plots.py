"""
Plots of a comparison: records of runs → a PNG file.
"""

import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_trim.plotting import save_figure, scale_values
from hf_trim.report.summary import ARMS, TITLES
from hf_trim.run.records import UNITS, metric_name, test_score


COLORS = {"plain": "tab:gray", "trimmed": "tab:red", "adaptive": "tab:green", "random": "tab:blue",
          "random-adaptive": "tab:cyan", "adaptive-skip": "tab:olive", "short": "black"}  # fmt: skip


def plot(records: list[dict], path: Path, title: str) -> None:
    """
    Three plots: the metric of each arm (mean, and the span of the seeds) and p of the trimmed one over the epochs; the
    metric over the seconds of training, for arms that have the times of all runs; and the differences from the plain
    arm, seed by seed.

    Args:
        records (`list[dict]`): Records of finished runs, of one recipe.
        path (`Path`): The PNG file.
        title (`str`): The plot's title.
    """
    metric = metric_name(records[0])
    # `Figure` instead of pyplot: no display, and nothing to close.
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    figure.suptitle(title)
    epochs, seconds, seeds = figure.subplots(1, 3)
    runs_of = {arm: sorted((r for r in records if r["arm"] == arm), key=lambda r: r["seed"]) for arm in ARMS}
    # With a validation split, the test split is looked at once, and there is no curve of it.
    is_validated = any(f"validation_{metric}" in entry for run in records for entry in run["history"])
    split = "validation" if is_validated else "test"
    for arm, runs in runs_of.items():
        if runs:
            _plot_curves(epochs, seconds, runs, f"{split}_{metric}", arm)
    for axes, label in ((epochs, "epoch"), (seconds, "seconds of training")):
        scale_values(axes)
        axes.set(xlabel=label, ylabel=f"{split} {metric}{UNITS[metric]}")
    _plot_fractions(epochs, runs_of["trimmed"])
    if not seconds.lines:  # older records do not say how long each epoch took, and disturbed ones have no time
        seconds.text(0.5, 0.5, "no arm has the times of all its runs", ha="center", transform=seconds.transAxes)
    _plot_differences(seeds, runs_of)
    seeds.set(xlabel="seed", ylabel=f"{TITLES[metric]}, difference to plain")
    # Below the plots, where it hides no point; arms have the same colour in all three.
    figure.legend(*epochs.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save_figure(figure, path)


def _plot_curves(epochs: Axes, seconds: Axes, runs: list[dict], key: str, arm: str) -> None:
    """The mean of one arm over the epochs and over the seconds; an epoch counts if all its runs were tested there."""
    curves = [{entry["epoch"]: entry[key] for entry in run["history"] if key in entry} for run in runs]
    shared = sorted(set.intersection(*map(set, curves)))
    if not shared:
        return
    values = [[curve[epoch] for curve in curves] for epoch in shared]
    label = f"{arm} ({len(runs)} run{'s' if len(runs) > 1 else ''})"
    means = [statistics.mean(v) for v in values]
    marker = "o" if len(shared) == 1 else None  # a line of one point is not seen
    width = 4 if arm == "plain" else 1.5  # shorter plain training may be the same, and would hide it
    epochs.plot(shared, means, color=COLORS[arm], label=label, marker=marker, lw=width)
    epochs.fill_between(shared, list(map(min, values)), list(map(max, values)), color=COLORS[arm], alpha=0.15, lw=0)
    clocks = [
        {entry["epoch"]: entry["train_seconds"] for entry in run["history"] if "train_seconds" in entry}
        for run in runs
    ]
    if all(epoch in clock for clock in clocks for epoch in shared):
        times = [statistics.mean(clock[epoch] for clock in clocks) for epoch in shared]
        seconds.plot(times, means, color=COLORS[arm], marker=marker, lw=width)


def _plot_fractions(epochs: Axes, trimmed: list[dict]) -> None:
    """The kept fraction p, which is the same for all seeds, on an axis of its own."""
    steps = [
        (entry["epoch"], entry["keep_fraction"])
        for run in trimmed[:1]
        for entry in run["history"]
        if "keep_fraction" in entry
    ]
    if steps:
        fractions = epochs.twinx()
        fractions.plot(*zip(*steps, strict=True), color="black", ls=":", drawstyle="steps-pre")
        fractions.set(ylabel="p of trimmed", ylim=(0, 1.05))
        epochs.plot([], [], color="black", ls=":", label="p of trimmed (right)")  # for the legend


def _plot_differences(seeds: Axes, runs_of: dict[str, list[dict]]) -> None:
    plain = {run["seed"]: test_score(run) for run in runs_of["plain"]}
    for number, arm in enumerate(ARMS[1:]):
        shift = 0.08 * number - 0.2  # side by side, so that no point hides another
        points = [
            (run["seed"] + shift, test_score(run) - plain[run["seed"]]) for run in runs_of[arm] if run["seed"] in plain
        ]
        if points:
            seeds.plot(*zip(*points, strict=True), "o", color=COLORS[arm])
    seeds.xaxis.set_major_locator(MaxNLocator(integer=True))
    seeds.axhline(0, color=COLORS["plain"])
