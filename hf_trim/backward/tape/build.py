"""
Compiles `tape.cpp`: `python build.py TARGET.so`. It runs in a process of its own, beside the training, and needs a C++
compiler and ninja. e.g. 40 seconds on one core; the library then serves all later runs with this version of torch.
"""

import os
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from torch.utils.cpp_extension import load


NAME = "hf_trim_tape"


def main(target: Path) -> None:
    """
    Args:
        target (`Path`): Where the library is put; it is there as a whole or not at all.
    """
    os.nice(10)  # the training goes first
    with ExitStack() as at_end:
        at_end.callback(target.with_suffix(".building").unlink, missing_ok=True)  # which says that this one builds
        folder = at_end.enter_context(tempfile.TemporaryDirectory())
        # The flags are made for speed of compiling: the work is done in torch's own kernels.
        load(NAME, [str(Path(__file__).with_name("tape.cpp"))], build_directory=folder, extra_cflags=["-O1"])
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}")
        shutil.copyfile(Path(folder, f"{NAME}.so"), unfinished)
        unfinished.replace(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
