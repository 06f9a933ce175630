"""
The C++ part of the tape, built once for each version of torch and Python into torch's cache of extensions
(`TORCH_EXTENSIONS_DIR`, or `~/.cache/torch_extensions`). Until it is there, and without a compiler, the engine in
Python goes on.

e.g. the first training on a machine runs its first minute without tapes, and all later ones have them at once.
"""

import hashlib
import importlib.util
import logging
import os
import platform
import subprocess
import sys
import time
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

import torch


logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_NAME = "hf_trim_tape"
_LONGEST_BUILD = 900  # seconds


@cache
def library_path() -> Path:
    """
    Returns:
        `Path`: Where the library is, or will be.
    """
    built_from = (
        *((_FOLDER / name).read_text() for name in ("tape.cpp", "graph.h", "program.h", "build.py")),
        torch.__version__, sys.version, platform.machine(),
    )  # fmt: skip
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"
    return Path(root).expanduser() / _NAME / f"{hashlib.sha256(repr(built_from).encode()).hexdigest()[:16]}.so"


class Extension:
    """The library: absent, being built, there, or given up."""

    def __init__(self) -> None:
        self._module: ModuleType | None = None
        self._build: subprocess.Popen | None = None
        self._is_given_up = os.name != "posix"

    def get(self, wait: bool = False) -> ModuleType | None:
        """
        The library. The first call has it built in the background if there is none yet.

        Args:
            wait (`bool`, *optional*, defaults to `False`): Whether to wait for the end of the build.

        Returns:
            The module, or `None` where there is none (yet).
        """
        if self._module is not None or self._is_given_up:
            return self._module
        if not library_path().exists():
            self._build_it(wait)
        if library_path().exists():
            self._import()
        elif self._build is not None and self._build.poll() not in (None, 0):
            self._give_up("could not be built. It needs a C++ compiler and ninja")
        return self._module

    def _build_it(self, wait: bool) -> None:
        if self._build is None and (wait or not self._is_being_built()):
            command, quiet = [sys.executable, str(_FOLDER / "build.py"), str(library_path())], subprocess.DEVNULL
            try:
                library_path().parent.mkdir(parents=True, exist_ok=True)
                library_path().with_suffix(".building").touch()
                self._build = subprocess.Popen(
                    command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True
                )
            except OSError as error:
                self._give_up(f"could not be built ({error})")
        if wait and self._build is not None:
            self._build.wait()

    @staticmethod
    def _is_being_built() -> bool:
        """Whether another process builds it: one of a machine is enough. (Or has been killed, if that is long ago.)"""
        try:
            return time.time() - library_path().with_suffix(".building").stat().st_mtime < _LONGEST_BUILD
        except OSError:
            return False

    def _import(self) -> None:
        try:
            spec = importlib.util.spec_from_loader(_NAME, ExtensionFileLoader(_NAME, str(library_path())))
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self._module = module
        except ImportError as error:
            self._give_up(f"could not be loaded ({error})")

    def _give_up(self, reason: str) -> None:
        self._is_given_up = True
        logger.log(
            logging.WARNING if torch.cuda.is_available() else logging.INFO,  # the CPU hardly gains
            f"The library that runs recorded backward passes {reason}: "
            f"`python {_FOLDER / 'build.py'} {library_path()}` says more. Training goes on without it: gradients are "
            "the same, and small models on a GPU take longer.",
        )


EXTENSION = Extension()
