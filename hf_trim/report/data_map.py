"""
A data map (Swayamdipta et al., arXiv 2009.10795): a memory of losses → a PNG file.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from hf_trim.plotting import save_figure
from hf_trim.trainer.memory import SampleMemory


MOST_POINTS = 20000
COLORS = {True: "tab:blue", False: "tab:red"}


def plot_data_map(memory: SampleMemory, path: Path, title: str) -> None:
    """
    Plot the mean probability of each sample's label over the training against its standard deviation. Wrong labels are
    often among those where both are low.

    Args:
        memory ([`~hf_trim.trainer.memory.SampleMemory`]): What the training of a classifier has seen of its samples.
        path (`Path`): The PNG file.
        title (`str`): The plot's title.
    """
    table = memory.to_dict()
    shown = (table["seen"] > 0).nonzero()[0]
    if len(shown) > MOST_POINTS:
        title = f"{title} ({MOST_POINTS:,} of {len(shown):,} samples, drawn at random)"
        shown = np.random.default_rng(0).choice(shown, MOST_POINTS, replace=False)
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    is_right = table["is_right"][shown]
    for value, label in ((True, "predicted right at last"), (False, "predicted wrong at last")):
        chosen = shown[is_right == value]
        axes.plot(
            table["confidence_std"][chosen], table["confidence"][chosen], ".", color=COLORS[value], alpha=0.5,
            markersize=4, label=f"{label} ({len(chosen):,})",
        )  # fmt: skip
    axes.set(
        title=title, xlabel="standard deviation of the label's probability", ylabel="mean probability of the label",
        ylim=(-0.02, 1.02),
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
