"""Repairs the import of torchvision's CUDA build beside a CPU build of torch."""

import re
import sys
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


# These objects must stay alive: torch drops a library's operators together with the object.
_LIBRARIES: list[Any] = []


def repair_torchvision() -> None:
    """
    Make `import torchvision` work, also if it was built for CUDA and torch is a CPU build.

    In that case torchvision's compiled operators are missing, and its import fails with `operator torchvision::nms
    does not exist`. After this call the import declares the missing operators. Everything in pure Python (transforms,
    models) then works; calling a missing operator still fails. Nothing is imported by the call itself, and where
    torchvision works as it is, or is not installed, nothing changes.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds torchvision as the other finders do, and has it executed by [`_execute`]."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                loader: Any = spec.loader
                loader.exec_module = partial(_execute, loader.exec_module)
                return spec
        return None


def _execute(execute: Any, module: ModuleType) -> None:
    """
    Execute torchvision, and once more for each operator that is missing.

    Raises:
        `RuntimeError`: If the import fails for another reason.
    """
    import torch  # here: who imports torchvision needs it anyway

    declared: set[str] = set()
    while True:
        try:
            return execute(module)
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None or missing[1] in declared:
                raise
            declared.add(missing[1])
            library = torch.library.Library("torchvision", "FRAGMENT")
            # Only the name matters: the operator has no kernel.
            library.define(f"{missing[1]}(Tensor input) -> Tensor")
            _LIBRARIES.append(library)
            # What was imported before the failure is incomplete.
            for name in [name for name in sys.modules if name.startswith("torchvision.")]:
                del sys.modules[name]
            for name in [name for name in vars(module) if not name.startswith("__")]:
                delattr(module, name)
