"""`python -m hf_trim.report RUNS...`: run records → tables and plots, from the records alone."""

import argparse
import csv
import io
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap

from hf_trim.files import write_json
from hf_trim.run.records import UNITS, fingerprint, metric_name, read_records, test_score


ARMS = ("plain", "trimmed", "random")
TITLES = {metric: f"test {metric}{unit}" for metric, unit in UNITS.items()}
COLORS = {"plain": "tab:gray", "trimmed": "tab:red", "random": "tab:blue"}
# Test error in percent without and with trimming, mean of 10 runs (arXiv 2110.13058, Table 1).
PAPER = {
    "svhn-resnet34": (5.87, 5.76),
    "svhn-densenet121": (4.62, 4.42),
    "cifar10-resnet34": (17.43, 17.01),
    "cifar10-densenet121": (10.10, 10.19),
    "cifar100-resnet34": (48.19, 47.72),
    "cifar100-densenet121": (32.95, 32.18),
}


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
        interval (`tuple[float, float]` or `None`): 95 % bootstrap interval of that mean; needs two seeds.
        wins (`int` or `None`): Number of seeds with a lower value than the plain arm's.
        seconds (`float` or `None`): Mean seconds of training per run, without evaluation; `None` if a record has none
            (`null`: other work on the machine disturbed the clock).
        speedup (`float` or `None`): The plain arm's seconds over this arm's, on the seeds they share.
    """

    arm: str
    runs: int
    metric: str
    mean: float
    sd: float | None
    difference: float | None
    interval: tuple[float, float] | None
    wins: int | None
    seconds: float | None
    speedup: float | None


def paired_interval(differences: list[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """
    Percentile bootstrap interval of a mean of paired differences. (With few seeds it is too narrow rather than too
    wide; a test of significance could not tell anything with so few.)

    Args:
        differences (`list[float]`): One difference per seed.
        confidence (`float`, *optional*, defaults to 0.95): Its level.

    Returns:
        `tuple[float, float]` or `None`: Lower and upper end; `None` for fewer than two differences.
    """
    if len(differences) < 2:
        return None
    found = bootstrap(
        (differences,), np.mean, confidence_level=confidence, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(found.low), float(found.high)


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
        scores = [test_score(runs[seed]) for seed in sorted(runs)]
        timed = all(run["train_seconds"] is not None for run in [*runs.values(), *plain.values()])
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
                sum(difference < 0 for difference in differences) if differences else None,
                statistics.mean(run["train_seconds"] for run in runs.values()) if timed else None,
                sum(plain[seed]["train_seconds"] for seed in shared)
                / sum(runs[seed]["train_seconds"] for seed in shared)
                if shared and timed
                else None,
            )
        )
    return summaries


def table_rows(records: list[dict]) -> tuple[list[str], list[list[str]]]:
    """
    Args:
        records (`list[dict]`): Records of finished runs, of one recipe with one setting. The paper's numbers stand
            beside ours if the recipe is one of the paper's.

    Returns:
        `tuple[list[str], list[list[str]]]`: Head and rows of the table, one an arm, as text.
    """
    summaries, recipe = summarize(records), records[0].get("recipe", "")
    title = TITLES[summaries[0].metric]
    head = ["arm", "runs", title, "difference to plain (95 % interval)", "better", "train time per run", "speed-up"]
    rows = []
    for s in summaries:
        wins = "–" if s.wins is None else f"{s.wins} of {s.runs}"
        seconds = "–" if s.seconds is None else f"{s.seconds:.1f} s"
        speedup = "–" if s.speedup is None else f"{s.speedup:.2f}×"
        rows.append([s.arm, str(s.runs), _score(s), _difference(s), wins, seconds, speedup])
        if recipe in PAPER and s.arm != "random":
            paper = PAPER[recipe]
            change = "–" if s.arm == "plain" else _signed(paper[1] - paper[0])
            rows.append([f"{s.arm} (paper)", "10", f"{paper[s.arm == 'trimmed']:.2f}", change, "–", "–", "–"])
    return head, rows


def overview_rows(groups: dict[str, list[dict]]) -> tuple[list[str], list[list[str]]]:
    """
    Args:
        groups (`dict[str, list[dict]]`): What [`group`] returned.

    Returns:
        `tuple[list[str], list[list[str]]]`: Head and rows, one a group, as text.
    """
    titles = {TITLES[metric_name(members[0])] for members in groups.values()}
    head = ["runs of", "seeds", *(f"{arm}, {' or '.join(sorted(titles))}" for arm in ARMS)]
    head += ["trimmed − plain (95 % interval)", "random − plain"]
    rows = []
    for title, members in groups.items():
        arms = {s.arm: s for s in summarize(members)}
        found = [arms.get(arm) for arm in ARMS]
        row = [title, str(max(s.runs for s in arms.values()))]
        row += ["–" if s is None else _score(s) for s in found]
        rows.append(row + ["–" if s is None else _difference(s) for s in found[1:]])
        paper = PAPER.get(members[0].get("recipe"))
        if paper:
            plain, trimmed = (f"{value:.2f}" for value in paper)
            rows.append([f"{title} (paper)", "10", plain, trimmed, "–", _signed(paper[1] - paper[0]), "–"])
    return head, rows


def _score(s: Summary) -> str:
    return f"{s.mean:.2f}" + ("" if s.sd is None else f" ± {s.sd:.2f}")


def _difference(s: Summary) -> str:
    if s.difference is None:
        return "–"
    interval = "" if s.interval is None else f" ({_signed(s.interval[0])} … {_signed(s.interval[1])})"
    return _signed(s.difference) + interval


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """
    Args:
        head (`list[str]`): Columns of a table.
        rows (`list[list[str]]`): Its rows.

    Returns:
        `str`: The table in Markdown.
    """
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def print_table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """
    Print a table.

    Args:
        title (`str`): What was compared.
        head (`list[str]`): Its columns.
        rows (`list[list[str]]`): Its rows.
    """
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
    Three plots: the metric of each arm (mean, and the span of the seeds) and p of the trimmed one over the epochs; the
    metric over the seconds of training; and the differences from the plain arm, seed by seed.

    Args:
        records (`list[dict]`): Records of finished runs, of one recipe.
        path (`Path`): The PNG file.
        title (`str`): The plot's title.
    """
    metric = metric_name(records[0])
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    figure.suptitle(title)
    epochs, seconds, seeds = figure.subplots(1, 3)
    by_arm = {arm: sorted((r for r in records if r["arm"] == arm), key=lambda r: r["seed"]) for arm in ARMS}
    for arm, runs in by_arm.items():
        if runs:
            _plot_curves(epochs, seconds, runs, f"test_{metric}", arm)
    for axes, label in ((epochs, "epoch"), (seconds, "seconds of training")):
        axes.set(xlabel=label, ylabel=TITLES[metric], yscale="log")
        axes.grid(alpha=0.3, which="both")
    steps = [
        (h["epoch"], h["keep_fraction"]) for r in by_arm["trimmed"][:1] for h in r["history"] if "keep_fraction" in h
    ]
    if steps:
        fractions = epochs.twinx()
        fractions.plot(*zip(*steps, strict=True), color="black", ls=":", drawstyle="steps-pre")
        fractions.set(ylabel="kept fraction p", ylim=(0, 1.05))
        epochs.plot([], [], color="black", ls=":", label="kept fraction p (right)")
    epochs.legend()
    seconds.set_visible(bool(seconds.lines))  # older records do not say how long each epoch took
    plain = {record["seed"]: test_score(record) for record in by_arm["plain"]}
    for shift, arm in ((-0.1, "trimmed"), (0.1, "random")):
        pairs = [(r["seed"] + shift, test_score(r) - plain[r["seed"]]) for r in by_arm[arm] if r["seed"] in plain]
        if pairs:
            seeds.plot(*zip(*pairs, strict=True), "o", color=COLORS[arm], label=arm)
            seeds.legend()
    seeds.xaxis.set_major_locator(MaxNLocator(integer=True))
    seeds.axhline(0, color=COLORS["plain"])
    seeds.set(xlabel="seed", ylabel=f"{TITLES[metric]}, difference to plain")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _plot_curves(epochs, seconds, runs: list[dict], key: str, arm: str) -> None:
    curves = [{h["epoch"]: h[key] for h in run["history"] if key in h} for run in runs]
    shared = sorted(set.intersection(*map(set, curves)))
    if not shared:
        return
    values = [[curve[epoch] for curve in curves] for epoch in shared]
    label = f"{arm} ({len(runs)} run{'s' if len(runs) > 1 else ''})"
    mean = [statistics.mean(v) for v in values]
    epochs.plot(shared, mean, color=COLORS[arm], label=label)
    epochs.fill_between(shared, list(map(min, values)), list(map(max, values)), color=COLORS[arm], alpha=0.15, lw=0)
    clocks = [{h["epoch"]: h["train_seconds"] for h in run["history"] if "train_seconds" in h} for run in runs]
    if all(epoch in clock for clock in clocks for epoch in shared):
        times = [statistics.mean(clock[epoch] for clock in clocks) for epoch in shared]
        seconds.plot(times, mean, color=COLORS[arm])


# ---- many runs -----------------------------------------------------------------------------------------------------


def find_records(paths: list[str]) -> list[dict]:
    """
    Args:
        paths (`list[str]`): Files with records, or folders that hold such files in `records` (at any depth) or are of
            nothing else.

    Returns:
        `list[dict]`: All records, without repetitions, in a fixed order.

    Raises:
        `ValueError`: If there is none, or a file is broken.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(path.rglob("records/*.json")) or sorted(path.glob("*.json"))
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"there is no file or folder {path}: give folders of comparisons, or files of records.")
    found = {_identity(record): record for file in files for record in read_records(file)}
    if not found:
        raise ValueError(f"no records in {', '.join(paths)}: `python -m hf_trim.run RECIPE --compare` makes some.")
    return [found[key] for key in sorted(found)]


def _identity(record: dict) -> tuple:
    arm = ARMS.index(record["arm"])
    return record.get("recipe", ""), fingerprint(record.get("settings", {})), arm, record["seed"]


def group(records: list[dict]) -> dict[str, list[dict]]:
    """
    Args:
        records (`list[dict]`): Records of any runs.

    Returns:
        `dict[str, list[dict]]`: Those of each recipe and settings, by a title that names the settings in which the
        groups of one recipe differ.
    """
    by_settings: dict[tuple, list[dict]] = {}
    for record in records:
        by_settings.setdefault(_identity(record)[:2], []).append(record)
    groups = {}
    for (recipe, _), members in by_settings.items():
        settings = [other[0].get("settings", {}) for key, other in by_settings.items() if key[0] == recipe]
        ours = members[0].get("settings", {})
        varied = [
            name for name in sorted({n for s in settings for n in s}) if len({str(s.get(name)) for s in settings}) > 1
        ]
        changes = [f"{name} {ours[name]}" for name in varied if name in ours]
        groups[", ".join([recipe, *changes])] = members
    return dict(sorted(groups.items()))


def main(argv: list[str] | None = None) -> int:
    """
    The command line.

    Args:
        argv (`list[str]`, *optional*): Arguments; the default is `sys.argv[1:]`.

    Returns:
        `int`: Exit status: 0, or 2 if there are no records.
    """
    parser = argparse.ArgumentParser("python -m hf_trim.report", description="Tables and plots of finished runs.")
    parser.add_argument("runs", nargs="+", help="Folders that --compare wrote, or JSON files of records.")
    parser.add_argument("--output", help="Folder for report.md, report.csv, plots and records.json.")
    args = parser.parse_args(argv)
    try:
        records = find_records(args.runs)
    except ValueError as error:
        print(f"hf_trim.report: {error}", file=sys.stderr)
        return 2
    groups = group(records)
    print_report(groups)
    if args.output:
        write_report(groups, Path(args.output))
        print(f"Written to {args.output}.")
    return 0


def print_report(groups: dict[str, list[dict]]) -> None:
    """
    Args:
        groups (`dict[str, list[dict]]`): What [`group`] returned; a table of each is printed, and one of all.
    """
    for title, members in groups.items():
        print_table(title, *table_rows(members))
    if len(groups) > 1:
        print_table("All", *overview_rows(groups))


def _about(records: list[dict]) -> list[str]:
    """What the runs ran on, and whether their input could keep up."""
    lines = sorted({f"{r.get('hardware', '?')}, torch {r.get('versions', {}).get('torch', '?')}" for r in records})
    timed = [r for r in records if "input_samples_per_second" in r]
    if timed:
        training, reading = (
            statistics.median(r[f"{what}_samples_per_second"] for r in timed) for what in ("train", "input")
        )
        lines.append(f"training {training:,.0f} samples/s, input alone {reading:,.0f} samples/s")
    return lines


def write_report(groups: dict[str, list[dict]], folder: Path) -> None:
    """
    Args:
        groups (`dict[str, list[dict]]`): What [`group`] returned.
        folder (`Path`): Where to write `report.md`, `report.csv`, a plot each, and all `records.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text, sheet = [], io.StringIO()
    if len(groups) > 1:
        text.append(f"## All\n\n{markdown_table(*overview_rows(groups))}")
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow(["runs of", *Summary._fields])
    for title, members in groups.items():
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in title)
        plot(members, folder / f"{name}.png", title)
        about, table = "; ".join(_about(members)), markdown_table(*table_rows(members))
        text.append(f"## {title}\n\n{about}\n\n{table}\n![{title}]({name}.png)\n")
        for s in summarize(members):
            interval = "" if s.interval is None else f"{s.interval[0]} {s.interval[1]}"
            writer.writerow([title, *s._replace(interval=interval)])
    (folder / "report.md").write_text("\n".join(text), encoding="utf-8")
    (folder / "report.csv").write_text(sheet.getvalue(), encoding="utf-8")
    write_json(folder / "records.json", [record for members in groups.values() for record in members])
