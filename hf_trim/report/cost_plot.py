"""
Error against cost: one small plot for each comparison, one point for each arm.

Left is cheap, below is good: e.g. a point that is left of plain training's and no higher saves time without harm, and
what is above the black point (shorter plain training) is worse than simply to train for fewer epochs.
"""

import math
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hf_trim.plotting import save_figure, scale_values
from hf_trim.report.plots import COLORS
from hf_trim.report.summary import ARMS, TITLES, summarize
from hf_trim.run.records import metric_name


COLUMNS = 4
NO_BREAK = "\N{NO-BREAK SPACE}"


def plot_costs(groups: dict[str, list[dict]], path: Path) -> bool:
    """
    Plot the mean of the test metric, with its standard error, over the passes of the training.

    Args:
        groups (`dict[str, list[dict]]`): What [`~hf_trim.report.group`] returned.
        path (`Path`): The PNG file.

    Returns:
        `bool`: Whether there was anything to plot: records of earlier versions do not say what a training cost.
    """
    arms_of = {title: [arm for arm in summarize(records) if arm.cost is not None] for title, records in groups.items()}
    arms_of = {title: arms for title, arms in arms_of.items() if arms}
    if not arms_of:
        return False
    costs = [100 * (arm.cost or 0) for arms in arms_of.values() for arm in arms]
    columns = min(COLUMNS, len(arms_of))
    rows = math.ceil(len(arms_of) / columns)
    figure = Figure(figsize=(3.6 * columns, 3 * rows + 0.5), layout="constrained")
    points: dict[str, Any] = {}
    for number, (title, arms) in enumerate(arms_of.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        for arm in arms:
            error = None if arm.sd is None else arm.sd / math.sqrt(arm.runs)
            size = 12 - 1.4 * ARMS.index(arm.arm)  # of arms with the same values all are seen
            points[arm.arm] = axes.errorbar(
                100 * (arm.cost or 0), arm.mean, error, fmt="o", ms=size, color=COLORS[arm.arm]
            )
            if arm.arm == "plain":
                axes.axhline(arm.mean, color=COLORS["plain"], ls=":", lw=1)
        scale_values(axes)
        parts = title.replace(" ", NO_BREAK).replace("," + NO_BREAK, ", ")  # lines end where a setting does
        axes.set_title(textwrap.fill(parts, 40, break_on_hyphens=False), fontsize=9)
        axes.set_xlim(min(costs) - 5, max(costs) + 5)  # the same in all, so that one look compares them
        axes.set(xlabel="cost, % of plain training", ylabel=TITLES[metric_name(groups[title][0])])
    figure.legend(list(points.values()), list(points), loc="outside lower center", ncols=2 * columns)
    save_figure(figure, path)
    return True
