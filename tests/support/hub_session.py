"""
Runs command lines and Python code against the Hub that HF_ENDPOINT names. That variable is read when huggingface_hub
is imported: hence a process of its own, which reads JSON lines from stdin and answers with JSON lines.
"""

import contextlib
import io
import json
import os
import sys
import time
import traceback

import hf_trim  # noqa: F401
from hf_trim.run.__main__ import main


def answer(question):
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(question["environment"])
    if "code" in question:
        exec(question["code"], {"__name__": "example"})
        return 0
    return main(question["argv"])


if __name__ == "__main__":
    wait = time.sleep
    time.sleep = lambda seconds: wait(min(seconds, 0.01))  # before huggingface_hub tries again: five times, 23 s
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
