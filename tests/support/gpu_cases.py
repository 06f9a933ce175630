"""Cases that do what those of `tests/support/gpu` must survive; in a module that imports nothing that takes long."""

import os
import signal
import time

from tests.support.gpu.process import OUT_OF_MEMORY, Unavailable, serve


RIGHT = {"gradient_error": 0.0, "limit": 1e-4, "host_waits": 0}
TRAINED = {"test_error": 3.0, "train_seconds": 1.0, "kept": [1.0, 0.2]}


def unavailable():
    raise Unavailable("no kernel")


def out_of_memory():
    raise type(OUT_OF_MEMORY, (RuntimeError,), {})("Tried to allocate 2 GiB. GPU 0 has less")


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def work(pipe, settings):
    """What the process of the cases does."""
    parts = {
        "exactness": {
            "unavailable": unavailable,
            "out of memory": out_of_memory,
            "wrong": lambda: {**RIGHT, "gradient_error": 0.5, "problem": "gradients differ"},
            "error": lambda: {}["a"],
            "crash": crash,
            "right": lambda: RIGHT,
        },
        "speed": {"right": lambda: {"steps": []}, "endless": lambda: time.sleep(1000)},
        "training": {"right": lambda: TRAINED},
    }
    serve(pipe, {"hardware": "none", "versions": {"torch": "2"}}, parts)


def end_at_once(pipe, settings):
    """Instead of it."""
    os._exit(3)
