"""
A report of groups of records: printed, or written as Markdown, CSV, plots and JSON.
"""

import csv
import io
import statistics
from pathlib import Path
from typing import Any

from hf_trim.files import write_json
from hf_trim.report.cost_plot import plot_costs
from hf_trim.report.notes import notes
from hf_trim.report.plots import plot
from hf_trim.report.summary import TITLES, Difference, Summary, summarize
from hf_trim.report.tables import brief_rows, markdown_table, overview_rows, table_rows
from hf_trim.report.terminal import print_table
from hf_trim.report.verdict import verdict_rows
from hf_trim.run.records import metric_name


COSTS = "costs.png"


def print_report(groups: dict[str, list[dict]]) -> None:
    """
    Print a table of each group, and one of all.

    Args:
        groups (`dict[str, list[dict]]`): What [`~hf_trim.report.group`] returned.
    """
    for title, records in groups.items():
        print_table(title, *table_rows(records), notes=tuple(notes(records)))
        print()
    if len(groups) > 1:
        metrics = sorted({TITLES[metric_name(records[0])] for records in groups.values()})
        print_table(f"All, {' or '.join(metrics)}, mean over the seeds", *brief_rows(groups))


def write_report(groups: dict[str, list[dict]], folder: Path) -> None:
    """
    Write `report.md`, `report.csv`, a plot of each group, one of error against cost, and all records
    (`records.json`).

    Args:
        groups (`dict[str, list[dict]]`): What [`~hf_trim.report.group`] returned.
        folder (`Path`): Where to write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sections, sheet = [], io.StringIO()
    if len(groups) > 1:
        sections.append(f"## All\n\n{markdown_table(*overview_rows(groups))}")
    if plot_costs(groups, folder / COSTS):
        sections.append(
            f"## At what cost\n\n![Error against cost]({COSTS})\n\n{markdown_table(*verdict_rows(groups))}"
        )
    lines = [_flat(title, summary) for title, records in groups.items() for summary in summarize(records)]
    writer = csv.DictWriter(sheet, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    for title, records in groups.items():
        # Titles hold blanks and commas, which links in Markdown do not allow.
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in title)
        plot(records, folder / f"{name}.png", title)
        environment, table = "; ".join(_describe_environment(records)), markdown_table(*table_rows(records))
        remarks = "".join(f"\n{note}\n" for note in notes(records))
        sections.append(f"## {title}\n\n{environment}\n\n{table}{remarks}\n![{title}]({name}.png)\n")
    (folder / "report.md").write_text("\n".join(sections), encoding="utf-8")
    (folder / "report.csv").write_text(sheet.getvalue(), encoding="utf-8")
    write_json(folder / "records.json", [record for records in groups.values() for record in records])


def _flat(title: str, summary: Summary) -> dict[str, Any]:
    """A line of the CSV file: column → value."""
    line: dict[str, Any] = {"runs of": title}
    for name, value in summary._asdict().items():
        if name in ("to_plain", "to_short"):
            parts = dict.fromkeys(Difference._fields) if value is None else value._asdict()
            line |= {f"{name}_{part}": _joined(parts[part]) for part in Difference._fields}
        else:
            line[name] = _joined(value)
    return line


def _joined(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, tuple) else value  # both ends of a range


def _describe_environment(records: list[dict]) -> list[str]:
    """The machines and versions of the runs, and whether reading the input kept up with training."""
    lines = sorted({f"{r.get('hardware', '?')}, torch {r.get('versions', {}).get('torch', '?')}" for r in records})
    timed = [r for r in records if "input_samples_per_second" in r]
    if timed:
        training, reading = (
            statistics.median(r[f"{part}_samples_per_second"] for r in timed) for part in ("train", "input")
        )
        lines.append(f"training {training:,.0f} samples/s, input alone {reading:,.0f} samples/s")
    return lines
