"""Axes of plots: linear with plain numbers, and logarithmic only where the values span decades; and their files."""

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter


DECADES = 2  # as many times a factor of ten from the lowest to the highest value are hard to see on a linear axis


def scale_values(axes: Axes) -> None:
    """
    Choose the scale of the vertical axis by the values that were plotted. A value of 0 has no place on a logarithmic
    one.

    Args:
        axes (`matplotlib.axes.Axes`): The axes, with all their lines.
    """
    values = [float(value) for line in axes.lines for value in np.asarray(line.get_ydata())]
    values = [value for value in values if math.isfinite(value)]
    if values and min(values) > 0 and max(values) >= 10**DECADES * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axes.grid(alpha=0.3, which="both")


def save_figure(figure: Figure, path: Path) -> None:
    """
    Write a plot as a PNG file.

    Args:
        figure (`matplotlib.figure.Figure`): The plot.
        path (`Path`): The file. Its folder is created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # No version of matplotlib in the file: the same numbers give the same bytes.
    figure.savefig(path, dpi=150, metadata={"Software": None})
