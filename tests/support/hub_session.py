"""
Runs command lines and Python code against the Hub whose address is in HF_ENDPOINT. huggingface_hub reads that variable
when it is imported, so that this is a process of its own. It reads JSON lines from stdin and answers with JSON lines.
"""

import contextlib
import gc
import io
import json
import os
import sys
import time
import traceback

import hf_trim  # noqa: F401
from hf_trim.run.__main__ import main
from tests.support.quick import measure_input_briefly


def answer(question):
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(question["environment"])
    if "code" in question:
        exec(question["code"], {"__name__": "example"})
        return 0
    return main(question["argv"])


if __name__ == "__main__":
    wait = time.sleep
    # huggingface_hub waits before it tries again: five times, 23 s.
    time.sleep = lambda seconds: wait(min(seconds, 0.01))
    measure_input_briefly()
    gc.freeze()  # as in conftest.py
    channel = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                status = answer(json.loads(line))
            except BaseException:
                traceback.print_exc(file=output)
                status = -1
        print(json.dumps({"status": status, "output": output.getvalue()}), file=channel, flush=True)
    os._exit(0)  # nothing is left to do, and Python takes seconds to clear its modules
