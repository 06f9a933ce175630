"""Repairs the import of torchvision's CUDA build beside a CPU build of torch."""

import re
import sys

import torch


# These objects must stay alive: torch drops a library's operators together with the object.
_LIBRARIES: list[torch.library.Library] = []


def import_torchvision() -> None:
    """
    Import torchvision, even if it was built for CUDA and torch is a CPU build.

    In that case torchvision's compiled operators are missing, and its import fails with `operator torchvision::nms
    does not exist`. This function declares the missing operators. Everything in pure Python (transforms, models) then
    works; calling a missing operator still fails. Does nothing if torchvision is not installed, or works as it is. It
    only helps if it is called before any other module imports torchvision: import hf_trim first.

    Raises:
        `RuntimeError`: If the import fails for another reason.
    """
    declared: set[str] = set()
    while True:
        try:
            import torchvision  # noqa: F401

            return
        except ModuleNotFoundError:
            return
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
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
