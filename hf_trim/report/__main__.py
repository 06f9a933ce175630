"""`python -m hf_trim.report RUNS...`: run records → tables and plots, from the records alone."""

import argparse
import sys
from pathlib import Path

from hf_trim.messages import print_error
from hf_trim.report.collect import find_records, group
from hf_trim.report.write import print_report, write_report


def main(argv: list[str] | None = None) -> int:
    """
    The command line.

    Args:
        argv (`list[str]`, *optional*): Arguments; the default is `sys.argv[1:]`.

    Returns:
        `int`: Exit status: 0, or 2 if there are no records, or the output cannot be written.
    """
    parser = argparse.ArgumentParser("python -m hf_trim.report", description="Tables and plots of finished runs.")
    parser.add_argument("runs", nargs="+", help="Folders that --compare wrote, or JSON files of records.")
    parser.add_argument("--output", help="Folder for report.md, report.csv, plots and records.json.")
    args = parser.parse_args(argv)
    try:
        records = find_records(args.runs)
    except ValueError as error:
        print_error(error)
        return 2
    groups = group(records)
    print_report(groups)
    if args.output:
        try:
            write_report(groups, Path(args.output))
        except OSError as error:
            print_error(f"cannot write the report to {args.output}: {error}. Give another --output.")
            return 2
        print(f"Written to {args.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
