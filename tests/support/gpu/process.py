"""
A process that runs cases, and what is done when it does not come back.

A case that takes too long, or breaks the process (a kernel that writes where it must not leaves a GPU of no use to
what follows), costs the case alone: the next one gets a new process.
"""

import gc
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple


PASSED, FAILED, CUT_OFF, UNAVAILABLE, NO_MEMORY = "passed", "failed", "cut off", "unavailable", "out of memory"

OUT_OF_MEMORY = "OutOfMemoryError"  # torch's


class Unavailable(Exception):
    """What a case needs is not here: a kernel for this GPU or these shapes, or a package."""


class Settings(NamedTuple):
    """
    What the process of the cases has to know.

    Args:
        output (`str`): The folder.
        toy (`bool`): Whether to run at toy size on the CPU.
        data (`str`, *optional*): The folder with the files of Fashion-MNIST.
    """

    output: str
    toy: bool
    data: str | None


class Greeting(NamedTuple):
    """
    What a process tells when it has started.

    Args:
        facts (`dict[str, Any]`): Hardware and versions.
        cases (`dict[str, list[str]]`): The names of the cases of each part.
    """

    facts: dict[str, Any]
    cases: dict[str, list[str]]


class CaseProcess:
    """
    The process of the cases, as the one that waits for it sees it.

    Args:
        settings ([`Settings`]): What it has to know.
        target (`Callable`, *optional*, defaults to [`work`]): What it does.
    """

    def __init__(self, settings: Settings, target: Callable[[Connection, Settings], None] | None = None):
        self.settings, self._target = settings, target or work
        self._process: Any = None

    def start(self, seconds: float) -> Greeting | None:
        """
        Args:
            seconds (`float`): How long to wait.

        Returns:
            [`Greeting`] or `None`: `None` if there is no GPU.

        Raises:
            `RuntimeError`: If it does not start.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=self._target, args=(theirs, self.settings))
        self._process.start()
        theirs.close()
        try:
            if self._pipe.poll(seconds):
                return self._pipe.recv()
            problem = f"did not start in {seconds:.0f} s"
        except EOFError:
            problem = "ended while it started"
        self.end()
        raise RuntimeError(f"The process of the cases {problem}.")

    def run(self, part: str, name: str, seconds: float) -> dict[str, Any]:
        """
        Run a case.

        Args:
            part, name (`str`): The case.
            seconds (`float`): How long to wait for it.

        Returns:
            `dict[str, Any]`: Its `status`, the `problem` if there is one, and what it measured.
        """
        end = time.monotonic() + seconds
        try:
            if self._process is None:
                self.start(seconds)
            self._pipe.send((part, name))
            if not self._pipe.poll(max(0.0, end - time.monotonic())):
                self.end(patience=0)
                return {"status": CUT_OFF, "problem": f"it was not finished after {seconds:.0f} s"}
            result, is_broken = self._pipe.recv()
        except (EOFError, OSError, RuntimeError) as error:
            code, status = self.end(), CUT_OFF if time.monotonic() >= end else FAILED
            return {"status": status, "problem": f"its process ended with {code}: {type(error).__name__} {error}"}
        if is_broken:
            self.end()
        return result

    def end(self, patience: float = 5.0) -> int | None:
        """
        End the process if it runs.

        Args:
            patience (`float`, *optional*, defaults to 5.0): For how many seconds it may end by itself, as it does
                between two cases.

        Returns:
            `int` or `None`: The exit code that it had by itself; of a signal, its negative number.
        """
        if self._process is None:
            return None
        process, self._process = self._process, None
        self._pipe.close()
        process.join(patience)
        code = process.exitcode
        process.kill()
        process.join()
        return code


# ---- in the process ----------------------------------------------------------------------------------------------


def work(pipe: Connection, settings: Settings) -> None:
    """
    What the process does: tell which cases there are, then run those that are asked for.

    Args:
        pipe (`multiprocessing.connection.Connection`): To the process that waits.
        settings ([`Settings`]): What to run.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with open(Path(settings.output) / "gpu.log", "ab") as log:  # trainings, tables and compilers write much
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    import hf_trim  # noqa: F401 (before transformers: it repairs torchvision where torch has no CUDA)

    # isort: split
    import torch

    from hf_trim.environment import hardware, versions
    from tests.support.gpu import exactness, speed, training

    if not settings.toy and not torch.cuda.is_available():
        pipe.send(None)
        return
    device = "cpu" if settings.toy else "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 is compared as such
    parts = {
        "exactness": exactness.make_cases(device),
        "speed": speed.make_cases(device),
        "training": training.make_cases(device, settings.output, settings.data),
    }
    gc.freeze()  # garbage is collected after each case: what was imported is none
    is_gpu = device == "cuda"
    facts = {
        "hardware": hardware(),
        "versions": versions(),
        "cuda": torch.version.cuda if is_gpu else None,
        "cudnn": torch.backends.cudnn.version() if is_gpu else None,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if is_gpu else None,
    }
    serve(pipe, facts, parts)


def serve(pipe: Connection, facts: dict[str, Any], parts: dict[str, dict[str, Callable[[], dict[str, Any]]]]) -> None:
    """
    Run the cases that are asked for, until no more are.

    Args:
        pipe (`multiprocessing.connection.Connection`): To the process that waits.
        facts (`dict[str, Any]`): Hardware and versions.
        parts (`dict[str, dict[str, Callable]]`): The cases of each part. A case returns what it has measured, and
            under `"problem"` what is wrong with it, if something is.
    """
    pipe.send(Greeting(facts, {part: list(cases) for part, cases in parts.items()}))
    while True:
        try:
            part, name = pipe.recv()
        except EOFError:
            return
        result = _run(parts[part][name])
        pipe.send((result, not _leave_clean()))


def _run(case: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a case returns, with its `status`."""
    try:
        result = case()
    except Unavailable as reason:
        return {"status": UNAVAILABLE, "problem": str(reason)}
    except (Exception, SystemExit) as error:
        if type(error).__name__ == OUT_OF_MEMORY:
            return {"status": NO_MEMORY, "problem": str(error).split(". ")[0]}
        return {"status": FAILED, "problem": traceback.format_exc(limit=-6)}
    return {"status": FAILED if result.get("problem") else PASSED, **result}


def _leave_clean() -> bool:
    """Free what a case has left. Returns whether the GPU can go on."""
    gc.collect()
    torch = sys.modules.get("torch")  # whose import takes longer than the tests of this file
    if torch is not None and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True
