"""
What libraries say goes to the log file of the run; the terminal shows progress and the warnings of hf_trim.

Until it is known that the run starts, it is kept in memory: a failed start leaves no file.
"""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partialmethod
from logging.handlers import MemoryHandler
from pathlib import Path

import datasets
import huggingface_hub.utils
from huggingface_hub import constants
from huggingface_hub.utils import enable_progress_bars
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from hf_trim.messages import wrap
from hf_trim.run.recipe import RecipeError


# Libraries that have a handler of their own, to the terminal.
LIBRARIES = ("transformers", "datasets", "huggingface_hub")
BARS_AFTER = 2.0  # seconds
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Memory(MemoryHandler):
    """What was said before the run has a file."""

    def __init__(self):
        super().__init__(10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)


class LateLogger(logging.Logger):
    """
    The logger of a library that is imported while a command runs. DeepSpeed gives its own a handler to the terminal,
    and speaks before its import has ended.
    """

    is_quiet = False  # while a command runs

    def callHandlers(self, record: logging.LogRecord) -> None:
        """Let only the handlers of the command have it."""
        if not self.is_quiet or self.name.partition(".")[0] == "hf_trim":
            super().callHandlers(record)
            return
        for handler in logging.getLogger().handlers:
            if record.levelno >= handler.level:
                handler.handle(record)


class PlainFormatter(logging.Formatter):
    """Lines without the colours that libraries have for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", super().format(record))


class LogFile(logging.FileHandler):
    """A log file that is made at its first line. A full disk must not end the training by its log."""

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8", delay=True)
        self.setFormatter(PlainFormatter(FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Do nothing: `logging` would print a traceback."""

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class Terminal(logging.Handler):
    """Notes and warnings as lines that do not break a progress bar, each of them once for all runs of a command."""

    def __init__(self):
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._said:
            self._said.add(message)
            tqdm.write(wrap(f"Note: {message}", sys.stderr), file=sys.stderr)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep what libraries log, warn and draw out of the terminal. [`write_chatter_to`] says where it goes."""
    root, own = logging.getLogger(), logging.getLogger("hf_trim")
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    memory, terminal = Memory(), Terminal()
    had_bars, bars_of_datasets = transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.handlers, logger.propagate = [], True
    root.addHandler(memory)
    own.addHandler(terminal)
    logging.captureWarnings(True)
    logger_class, LateLogger.is_quiet = logging.getLoggerClass(), True
    logging.setLoggerClass(LateLogger)
    transformers_logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    elif not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()  # those of downloads, which transformers has just disabled with its own
    try:
        with _brief_bars():
            yield
    except Exception as error:
        # What libraries said last may explain an error that nobody expected.
        if memory in root.handlers and not isinstance(error, (RecipeError, OSError)):
            memory.setTarget(logging.StreamHandler())
            memory.flush()
        raise
    finally:
        own.removeHandler(terminal)
        for handler in root.handlers[:]:
            if handler is memory or isinstance(handler, LogFile):
                root.removeHandler(handler)
                handler.close()
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
        logging.captureWarnings(False)
        logging.setLoggerClass(logger_class)
        LateLogger.is_quiet = False
        if had_bars:
            transformers_logging.enable_progress_bar()
        if not bars_of_datasets:
            datasets.enable_progress_bars()


@contextmanager
def _brief_bars() -> Iterator[None]:
    """Bars of libraries appear only where something takes a while, and leave nothing behind."""
    classes = (datasets.utils.tqdm, huggingface_hub.utils.tqdm)
    makers = [bar.__init__ for bar in classes]
    for bar, make in zip(classes, makers, strict=True):
        bar.__init__ = partialmethod(make, delay=BARS_AFTER, leave=False)  # type: ignore[misc]
    try:
        yield
    finally:
        for bar, make in zip(classes, makers, strict=True):
            bar.__init__ = make  # type: ignore[misc]


def write_chatter_to(path: Path) -> None:
    """
    Write what was and what will be said to a file, in the place of memory or another file.

    Args:
        path (`Path`): The log file; its folder exists.
    """
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, (Memory, LogFile)) and getattr(handler, "baseFilename", "") != str(path.absolute()):
            file = LogFile(path)
            if isinstance(handler, Memory):
                handler.setTarget(file)
                handler.flush()
            root.removeHandler(handler)
            handler.close()
            root.addHandler(file)
