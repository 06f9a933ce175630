"""Rooms of the package know each other by public names only, and each module can be the first that is imported."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_trim


PACKAGE = Path(hf_trim.__file__).parent
SHARED = ("_torch_internals", "_compile_internals")  # all rooms reach torch's private names through them


def private_imports(source, room):
    """Names that a file in `room` imports from another room, and that begin with an underscore."""
    private = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            modules = [(node.module or "", [alias.name for alias in node.names])]
        elif isinstance(node, ast.Import):
            modules = [(alias.name, []) for alias in node.names]
        else:
            continue
        for module, names in modules:
            package, *parts = module.split(".")
            # `hf_trim/_compat.py`, at the top level, is for all rooms.
            if package == "hf_trim" and parts and parts[0] != room:
                inner = [name for name in (*parts[1:], *names) if name not in SHARED]
                private += [f"{module}: {name}" for name in inner if name.startswith("_") and not name.endswith("__")]
    return private


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_private_name_of_another_room(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert private_imports(path.read_text(encoding="utf-8"), room) == []


@pytest.mark.parametrize(
    "line, private",
    [
        ("from hf_trim.data.load import load_data, _subset", ["hf_trim.data.load: _subset"]),
        ("from hf_trim.run import _hidden", ["hf_trim.run: _hidden"]),
        ("from hf_trim.backward._hidden import f", ["hf_trim.backward._hidden: _hidden"]),
        ("from hf_trim.backward._torch_internals import f", []),
        ("from hf_trim.backward._torch_internals import _f", ["hf_trim.backward._torch_internals: _f"]),
        ("from hf_trim.trainer.trainer import _num_labels", []),
        ("from hf_trim._compat import HUB_ERRORS", []),
        ("from hf_trim.report.__main__ import main", []),
        ("from torch import _C", []),
    ],
)
def test_private_imports_are_found(line, private):
    assert private_imports(line, "trainer") == private


# Imports each module in a process of its own, which has only what other packages give.
IMPORT_EACH = """
import importlib, os, sys
import hf_trim
import torch, transformers.trainer, datasets, evaluate, matplotlib.figure, rich.table, timm
hf_trim = [name for name in sys.modules if name.partition(".")[0] == "hf_trim"]
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        for loaded in hf_trim:
            del sys.modules[loaded]
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"{name}: {error}", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.extended
def test_each_module_can_be_imported_first():
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in FILES]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    done = subprocess.run([sys.executable, "-c", IMPORT_EACH, *names], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "")
