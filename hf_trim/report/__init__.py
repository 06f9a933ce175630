"""Run records → tables and plots."""

from hf_trim.report.collect import find_records, group
from hf_trim.report.notes import notes
from hf_trim.report.plots import plot
from hf_trim.report.summary import ARMS, summarize
from hf_trim.report.tables import markdown_table, table_rows
from hf_trim.report.terminal import print_table, print_wide
from hf_trim.report.write import print_report, write_report


__all__ = [
    "ARMS",
    "find_records",
    "group",
    "markdown_table",
    "notes",
    "plot",
    "print_report",
    "print_table",
    "print_wide",
    "summarize",
    "table_rows",
    "write_report",
]
