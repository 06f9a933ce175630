"""`python -m hf_trim.bench`: time, memory and gradients of a training step, for each backward pass and each p."""

import sys

from hf_trim.bench.steps import main
from hf_trim.processes import leave_process_group


if __name__ == "__main__":
    status = main()
    leave_process_group()
    sys.exit(status)
