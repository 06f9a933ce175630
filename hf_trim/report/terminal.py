"""
Tables in the terminal, no wider than it: columns are left out, lines are not broken.

Head and rows of cells → a table of rich, with as many columns as fit.
"""

import os
import re

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


# What can be missed first where the terminal is narrow; report.md and report.csv have all columns.
LEAST = ("train time", "runs", "better than short", "better", "macro-F1", "kept", "speed-up", "speed-up [range]",
         "to short")  # fmt: skip

FILE = 200  # columns of a file
NAME = 10  # least width of the first column: without the names of its rows a table says nothing


def print_table(
    title: str, head: list[str], rows: list[list[str]], notes: tuple[str, ...] = (), least: tuple[str, ...] = LEAST
) -> None:
    """
    Print a table.

    Args:
        title (`str`): What was compared.
        head (`list[str]`): Its columns.
        rows (`list[list[str]]`): Its rows.
        notes (`tuple[str, ...]`, *optional*): Sentences below it.
        least (`tuple[str, ...]`, *optional*): Columns that are left out, one after the other, until the others fit.
    """
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:  # a file or a pipe, for which rich takes 80 columns
        console = Console(highlight=False, width=FILE)
    unlimited = console.options.update(max_width=10_000)  # measured in the terminal's own width, each table fits
    shown = list(range(len(head)))
    table = _make_table(head, rows, shown)
    for name in least:
        if console.measure(table, options=unlimited).maximum <= console.width:
            break
        shown = [column for column in shown if head[column] != name]
        table = _make_table(head, rows, shown)
    console.print(Text(title, style="bold"))
    console.print(table)
    for note in notes:
        console.print(Text(note, style="yellow" if note.startswith("Warning") else ""))


def print_wide(table: Table) -> None:
    """
    Print a table that has no columns to spare; where the output is no terminal it is not squeezed into 80 columns.

    Args:
        table (`rich.table.Table`): The table.
    """
    console = Console()  # 80 columns wide where the output is a file
    Console(width=max(console.width, 120)).print(table)


def _make_table(head: list[str], rows: list[list[str]], shown: list[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in shown:
        # A head over two lines is narrower: "difference to plain" above its "(95 % interval)".
        name = Text(re.sub(r" (?=[(\[])|(?<=random-)|(?<=adaptive-)", "\n", head[column]))
        is_first = column == 0
        table.add_column(
            name, justify="left" if is_first else "right", no_wrap=not is_first, overflow="fold",
            min_width=NAME if is_first else None,
        )  # fmt: skip
    for row in rows:
        table.add_row(*(Text(row[column], style=_color_of(row[column])) for column in shown))
    return table


def _color_of(cell: str) -> str:
    """Green or red for a difference whose interval is on one side of zero."""
    if "(−" in cell and "… −" in cell:
        return "green"
    return "red" if "(+" in cell and "… +" in cell else ""
