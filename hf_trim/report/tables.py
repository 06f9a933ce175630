"""
Tables of a comparison, and of many, as text: for the terminal, README and model cards.

Records of runs → [`~hf_trim.report.summary.Summary`] of each arm → head and rows of cells, all strings.
"""

from rich.console import Console
from rich.table import Table

from hf_trim.report.summary import ARMS, PAPER, TITLES, Summary, summarize
from hf_trim.run.records import metric_name


def table_rows(records: list[dict]) -> tuple[list[str], list[list[str]]]:
    """
    Args:
        records (`list[dict]`): Records of finished runs, of one recipe with one setting. The paper's numbers stand
            beside ours if the recipe is one of the paper's.

    Returns:
        `tuple[list[str], list[list[str]]]`: Head and rows of the table, one an arm, as text.
    """
    recipe, metric = records[0].get("recipe", ""), TITLES[metric_name(records[0])]
    head = ["arm", "runs", metric, "difference to plain (95 % interval)", "better", "kept",
            "train time", "speed-up"]  # fmt: skip
    rows = []
    for summary in summarize(records):
        wins = "–" if summary.wins is None else f"{summary.wins} of {summary.runs}"
        seconds = "–" if summary.seconds is None else f"{summary.seconds:.1f} s"
        speedup = "–" if summary.speedup is None else f"{summary.speedup:.2f}×"
        score, difference = _format_score(summary), _format_difference(summary)
        rows.append([summary.arm, str(summary.runs), score, difference, wins, _format_kept(summary), seconds, speedup])
        if recipe in PAPER and summary.arm in ("plain", "trimmed"):  # the paper has no other arms
            plain, trimmed = PAPER[recipe]
            error, change = (plain, "–") if summary.arm == "plain" else (trimmed, _format_signed(trimmed - plain))
            rows.append([f"{summary.arm} (paper)", "10", f"{error:.2f}", change, "–", "–", "–", "–"])
    return head, rows


def overview_rows(groups: dict[str, list[dict]]) -> tuple[list[str], list[list[str]]]:
    """
    Args:
        groups (`dict[str, list[dict]]`): What [`~hf_trim.report.group`] returned.

    Returns:
        `tuple[list[str], list[list[str]]]`: Head and rows, one a group, as text: of each arm the score, the fraction
            that was kept on average, and the difference to plain with its 95 % interval.
    """
    metrics = {TITLES[metric_name(records[0])] for records in groups.values()}
    trained = {record["arm"] for records in groups.values() for record in records}
    arms = [arm for arm in ARMS if arm in trained or "adaptive" not in arm]
    head = ["runs of", "seeds", f"{arms[0]}, {' or '.join(sorted(metrics))}"]
    head += [f"{arm}; kept; difference to plain" for arm in arms[1:]]
    rows = []
    for title, records in groups.items():
        summary_of = {summary.arm: summary for summary in summarize(records)}
        summaries = [summary_of.get(arm) for arm in arms]
        row = [title, str(max(summary.runs for summary in summary_of.values()))]
        row += ["–" if summary is None else _format_all(summary) for summary in summaries]
        rows.append(row)
        recipe = records[0].get("recipe")
        if recipe in PAPER:
            plain, trimmed = PAPER[recipe]
            paper = {"plain": f"{plain:.2f}", "trimmed": f"{trimmed:.2f}; 60 %; {_format_signed(trimmed - plain)}"}
            rows.append([f"{title} (paper)", "10", *(paper.get(arm, "–") for arm in arms)])
    return head, rows


def _format_all(summary: Summary) -> str:
    if summary.arm == "plain":
        return _format_score(summary)
    return f"{_format_score(summary)}; {_format_kept(summary)}; {_format_difference(summary)}"


def _format_kept(summary: Summary) -> str:
    return "–" if summary.kept is None else f"{100 * summary.kept:.0f} %"


def _format_score(summary: Summary) -> str:
    return f"{summary.mean:.2f}" + ("" if summary.sd is None else f" ± {summary.sd:.2f}")


def _format_difference(summary: Summary) -> str:
    if summary.difference is None:
        return "–"
    difference = _format_signed(summary.difference)
    if summary.interval is None:
        return difference
    low, high = summary.interval
    return f"{difference} ({_format_signed(low)} … {_format_signed(high)})"


def _format_signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")  # a minus sign is as wide as a plus


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
    console = Console()  # 80 columns wide where the output is a file
    Console(width=max(console.width, 120)).print(table)
