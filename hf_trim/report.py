"""Run records → the comparison table and its plot."""

import statistics
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.stats import t

from hf_trim.records import metric_name, test_score


ARMS = ("plain", "trimmed", "random")
TITLES = {"error": "test error %", "perplexity": "test perplexity"}
COLORS = {"plain": "tab:gray", "trimmed": "tab:red", "random": "tab:blue"}


class Summary(NamedTuple):
    """
    One arm of a comparison.

    Args:
        arm (`str`): `"plain"`, `"trimmed"` or `"random"`.
        runs (`int`): Number of runs.
        metric (`str`): `"error"` or `"perplexity"`.
        mean (`float`): Its mean on the test split; of the error, in percent.
        sd (`float` or `None`): Its standard deviation over the seeds; `None` for a single run.
        difference (`float` or `None`): Mean of the paired differences from the plain arm, seed by seed, in percentage
            points for errors; `None` for the plain arm.
        interval (`tuple[float, float]` or `None`): 95 % interval of that mean (Student's t); needs two seeds.
        seconds (`float`): Mean seconds of training per run, without evaluation.
        speedup (`float` or `None`): The plain arm's seconds over this arm's, on the seeds they share.
    """

    arm: str
    runs: int
    metric: str
    mean: float
    sd: float | None
    difference: float | None
    interval: tuple[float, float] | None
    seconds: float
    speedup: float | None


def paired_interval(differences: list[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """
    Interval of a mean of paired differences.

    Args:
        differences (`list[float]`): One difference per seed.
        confidence (`float`, *optional*, defaults to 0.95): Its level.

    Returns:
        `tuple[float, float]` or `None`: Lower and upper end; `None` for fewer than two differences.
    """
    if len(differences) < 2:
        return None
    half = statistics.stdev(differences) / len(differences) ** 0.5 * t.ppf((1 + confidence) / 2, len(differences) - 1)
    mean = statistics.mean(differences)
    return mean - half, mean + half


def summarize(records: list[dict]) -> list[Summary]:
    """
    Args:
        records (`list[dict]`): Records of finished runs, of one recipe.

    Returns:
        `list[Summary]`: One per arm that has runs, plain first.
    """
    by_arm = {arm: {r["seed"]: r for r in records if r["arm"] == arm} for arm in ARMS}
    plain = by_arm["plain"]
    summaries = []
    for arm, runs in by_arm.items():
        if not runs:
            continue
        scores = [test_score(run) for run in runs.values()]
        shared = sorted(runs.keys() & plain.keys()) if arm != "plain" else []
        differences = [test_score(runs[seed]) - test_score(plain[seed]) for seed in shared]
        summaries.append(
            Summary(
                arm,
                len(runs),
                metric_name(records[0]),
                statistics.mean(scores),
                statistics.stdev(scores) if len(scores) > 1 else None,
                statistics.mean(differences) if differences else None,
                paired_interval(differences),
                statistics.mean(run["train_seconds"] for run in runs.values()),
                sum(plain[seed]["train_seconds"] for seed in shared)
                / sum(runs[seed]["train_seconds"] for seed in shared)
                if shared
                else None,
            )
        )
    return summaries


def table_rows(summaries: list[Summary]) -> tuple[list[str], list[list[str]]]:
    """
    Args:
        summaries (`list[Summary]`): The arms.

    Returns:
        `tuple[list[str], list[list[str]]]`: Head and rows of the table, as text.
    """
    title = TITLES[summaries[0].metric]
    head = ["arm", "runs", title, "difference to plain (95 % interval)", "train time per run", "speed-up"]
    rows = []
    for s in summaries:
        error = f"{s.mean:.2f}" + ("" if s.sd is None else f" ± {s.sd:.2f}")
        difference = "–" if s.difference is None else f"{s.difference:+.2f}"
        if s.interval is not None:
            difference += f" ({s.interval[0]:+.2f} … {s.interval[1]:+.2f})"
        speedup = "–" if s.speedup is None else f"{s.speedup:.2f}×"
        rows.append([s.arm, str(s.runs), error, difference, f"{s.seconds:.1f} s", speedup])
    return head, rows


def print_table(title: str, summaries: list[Summary]) -> None:
    """
    Print the comparison.

    Args:
        title (`str`): What was compared.
        summaries (`list[Summary]`): The arms.
    """
    head, rows = table_rows(summaries)
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(head):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    print_wide(table)


def print_wide(table: Table) -> None:
    """
    Print a table; where the output is no terminal it is not squeezed into 80 columns.

    Args:
        table (`rich.table.Table`): The table.
    """
    console = Console()
    Console(width=max(console.width, 120)).print(table)


def plot(records: list[dict], path: Path, title: str) -> None:
    """
    The metric of each arm (mean, and the span of the seeds) and p of the trimmed one, over the epochs.

    Args:
        records (`list[dict]`): Records of finished runs, of one recipe.
        path (`Path`): The PNG file.
        title (`str`): The plot's title.
    """
    metric = metric_name(records[0])
    key = f"test_{metric}"
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for arm in ARMS:
        runs = [record for record in records if record["arm"] == arm]
        curves = [{h["epoch"]: h[key] for h in run["history"] if key in h} for run in runs]
        epochs = sorted(set.intersection(*map(set, curves))) if curves else []
        if not epochs:
            continue
        values = [[curve[epoch] for curve in curves] for epoch in epochs]
        label = f"{arm} ({len(runs)} run{'s' if len(runs) > 1 else ''})"
        axes.plot(epochs, [statistics.mean(v) for v in values], color=COLORS[arm], label=label)
        axes.fill_between(epochs, list(map(min, values)), list(map(max, values)), color=COLORS[arm], alpha=0.15, lw=0)
    axes.set(title=title, xlabel="epoch", ylabel=TITLES[metric], yscale="log")
    axes.grid(alpha=0.3, which="both")
    trimmed = [record for record in records if record["arm"] == "trimmed"]
    if trimmed:
        steps = [(h["epoch"], h["trim_fraction"]) for h in trimmed[0]["history"] if "trim_fraction" in h]
        fractions = axes.twinx()
        fractions.plot(*zip(*steps, strict=True), color="black", ls=":", drawstyle="steps-pre")
        fractions.set(ylabel="kept fraction p", ylim=(0, 1.05))
        axes.plot([], [], color="black", ls=":", label="kept fraction p (right)")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
