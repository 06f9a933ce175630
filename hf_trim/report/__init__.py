"""Run records → tables and plots."""

from hf_trim.report.tables import (
    ARMS,
    find_records,
    group,
    markdown_table,
    plot,
    print_report,
    print_table,
    print_wide,
    summarize,
    table_rows,
    write_report,
)


__all__ = [
    "ARMS",
    "find_records",
    "group",
    "markdown_table",
    "plot",
    "print_report",
    "print_table",
    "print_wide",
    "summarize",
    "table_rows",
    "write_report",
]
