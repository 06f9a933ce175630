"""`python -m hf_trim.run RECIPE`: train a recipe, or compare it with and without trimming."""

import sys

from hf_trim.processes import leave_process_group
from hf_trim.run.train import main


if __name__ == "__main__":
    status = main()
    leave_process_group()
    sys.exit(status)
