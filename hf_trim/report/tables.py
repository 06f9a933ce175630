"""
Tables of a comparison, and of many, as text: for README and model cards.

Records of runs → [`~hf_trim.report.summary.Summary`] of each arm → head and rows of cells, all strings.
"""

from hf_trim.messages import signed
from hf_trim.report.summary import ARMS, PAPER, TITLES, Difference, Summary, summarize
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
    summaries = summarize(records)
    has_f1 = any(summary.macro_f1 is not None for summary in summaries)
    has_cost = any(summary.cost is not None for summary in summaries)
    has_short = any(summary.to_short is not None for summary in summaries)
    differences = [summary.to_plain for summary in summaries if summary.to_plain is not None]
    interval = " (95 % interval)" if any(difference.interval for difference in differences) else ""
    if not interval and any(difference.span for difference in differences):
        interval = " [range]"
    speedup = "speed-up [range]" if any(summary.speedup_span for summary in summaries) else "speed-up"
    head = ["arm", "runs", metric, *["macro-F1"] * has_f1, f"difference to plain{interval}", "better",
            *["to short", "better than short"] * has_short, "kept", *["cost"] * has_cost, "train time",
            speedup]  # fmt: skip
    rows = []
    for summary in summaries:
        cells = [
            str(summary.runs),
            _format_score(summary),
            *[format_number(summary.macro_f1)] * has_f1,
            format_difference(summary.to_plain),
            _format_wins(summary.to_plain),
            *[format_difference(summary.to_short), _format_wins(summary.to_short)] * has_short,
            _format_kept(summary),
            *[format_cost(summary)] * has_cost,
            _format_seconds(summary),
            _format_speedup(summary),
        ]
        rows.append([summary.arm, *cells])
        if recipe in PAPER and summary.arm in ("plain", "trimmed"):  # the paper has no other arms
            plain, trimmed = PAPER[recipe]
            error, change = (plain, "–") if summary.arm == "plain" else (trimmed, signed(trimmed - plain))
            cells = ["10", f"{error:.2f}", *["–"] * has_f1, change, *["–"] * (4 + 2 * has_short + has_cost)]
            rows.append([f"{summary.arm} (paper)", *cells])
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
    arms = [arm for arm in ARMS if arm in trained or arm in ("plain", "trimmed", "random")]
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
            rows.append([f"{title} (paper)", *paper_cells(recipe, arms)])
    return head, rows


def paper_cells(recipe: str, arms: list[str]) -> list[str]:
    """The numbers of the paper's Table 1 for a recipe of it, as the cells of a row of [`overview_rows`]."""
    plain, trimmed = PAPER[recipe]
    cells = {"plain": f"{plain:.2f}", "trimmed": f"{trimmed:.2f}; 60 %; {signed(trimmed - plain)}"}
    return ["10", *(cells.get(arm, "–") for arm in arms)]


def _format_all(summary: Summary) -> str:
    if summary.arm == "plain":
        return _format_score(summary)
    return f"{_format_score(summary)}; {_format_kept(summary)}; {format_difference(summary.to_plain)}"


def brief_rows(groups: dict[str, list[dict]]) -> tuple[list[str], list[list[str]]]:
    """
    Args:
        groups (`dict[str, list[dict]]`): What [`~hf_trim.report.group`] returned.

    Returns:
        `tuple[list[str], list[list[str]]]`: As [`overview_rows`], with nothing but the means: for the terminal.
    """
    trained = {record["arm"] for records in groups.values() for record in records}
    arms = [arm for arm in ARMS if arm in trained]
    rows = []
    for title, records in groups.items():
        means = {summary.arm: summary.mean for summary in summarize(records)}
        rows.append([title, *(format_number(means.get(arm)) for arm in arms)])
    return ["runs of", *arms], rows


def _format_kept(summary: Summary) -> str:
    return "–" if summary.kept is None else f"{100 * summary.kept:.0f} %"


def _format_score(summary: Summary) -> str:
    return f"{summary.mean:.2f}" + ("" if summary.sd is None else f" ± {summary.sd:.2f}")


def _format_seconds(summary: Summary) -> str:
    """The mean, and of how many runs it is if not of all."""
    if summary.seconds is None:
        return "–"
    some = "" if summary.timed == summary.runs else f" ({summary.timed} of {summary.runs} runs)"
    return f"{summary.seconds:.1f} s{some}"


def format_cost(summary: Summary) -> str:
    """
    Args:
        summary ([`Summary`]): An arm.

    Returns:
        `str`: Its passes in percent of plain training's.
    """
    return "–" if summary.cost is None else f"{100 * summary.cost:.0f} %"


def format_difference(difference: Difference | None) -> str:
    """
    Args:
        difference ([`Difference`], *optional*): The difference between two arms.

    Returns:
        `str`: The mean with its interval in round brackets, or of few seeds with their range in square ones.
    """
    if difference is None:
        return "–"
    if difference.span is None:
        return signed(difference.mean)
    low, high = map(signed, difference.interval or difference.span)
    left, right = "()" if difference.interval else "[]"
    return f"{signed(difference.mean)} {left}{low} … {high}{right}"


def _format_wins(difference: Difference | None) -> str:
    return "–" if difference is None else f"{difference.wins} of {difference.pairs}"


def _format_speedup(summary: Summary) -> str:
    if summary.speedup is None:
        return "–"
    if summary.speedup_span is None:
        return f"{summary.speedup:.2f}×"
    low, high = summary.speedup_span
    return f"{summary.speedup:.2f}× [{low:.2f} … {high:.2f}]"


def format_number(value: float | None) -> str:
    """
    Args:
        value (`float`, *optional*): A number.

    Returns:
        `str`: The number with two digits after the point; a dash if there is none.
    """
    return "–" if value is None else f"{value:.2f}"


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
