"""`python -m hf_trim.report RUNS...`: run records → tables and plots, from the records alone."""

import sys

from hf_trim.report.tables import main


if __name__ == "__main__":
    sys.exit(main())
