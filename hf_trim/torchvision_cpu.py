"""Import torchvision where its compiled operators do not fit a CPU-only torch."""

import re
import sys

import torch


# Fragments must stay alive: torch drops a library's schemas with the object.
_LIBRARIES: list[torch.library.Library] = []


def import_torchvision() -> None:
    """
    Import torchvision, even if it was built for CUDA and torch is a CPU build.

    The compiled operators are then missing, and the import stops at the first one whose fake kernel torchvision
    registers. Declaring the missing ones lets all that is pure Python (transforms, models) work; calling a missing
    operator still fails. Does nothing where torchvision is not installed or works as it is.

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
            # Only the name matters: no kernel stands behind the schema.
            library.define(f"{missing[1]}(Tensor input) -> Tensor")
            _LIBRARIES.append(library)
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
