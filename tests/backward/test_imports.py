"""What the backward pass may import: nothing else of hf_trim, and torch's private names in two modules only."""

import ast
from pathlib import Path

import pytest

import hf_trim


PACKAGE = Path(hf_trim.__file__).parent
INTERNALS = ("backward/_torch_internals.py", "backward/_compile_internals.py")
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def imports(tree: ast.AST):
    """`(module, name)` of each import; the name is empty for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def attribute_path(node: ast.AST) -> list[str]:
    """`["torch", "_C", "DispatchKey"]` for `torch._C.DispatchKey`; empty for what is no plain path."""
    if isinstance(node, ast.Name):
        return [node.id]
    path = attribute_path(node.value) if isinstance(node, ast.Attribute) else []
    return [*path, node.attr] if path else []


# Private or unstable attributes of torch's objects, wherever they are read from.
ATTRIBUTES = {
    "_schema", "_overloadname", "overloadpacket", "_forward_cls", "_version", "_make_wrapper_subclass",
    "_compiled_call_impl", "_lazy_backward_info", "_backward_impl", "weak_holders", "recomputed", "recomp_counter",
    "x_metadatas", "metadata_fn", "recompute_fn", "run_function", "unpack_hook",
}  # fmt: skip


def private_names(tree: ast.AST) -> set[str]:
    """What a module uses of torch that is private: imported, reached from `torch`, or an attribute of its objects."""
    names = set()
    for module, name in imports(tree):
        path = [*module.split("."), name]
        if path[0] == "torch" and any(is_private(part) for part in path):
            names.add(".".join(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            path = attribute_path(node)
            of_torch = path[:1] in (["torch"], ["Tensor"]) and any(is_private(part) for part in path)
            if of_torch or node.attr in ATTRIBUTES:
                names.add(".".join(path) or node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in ATTRIBUTES or node.value.startswith("_raw_saved"):  # for getattr
                names.add(node.value)
    return names


def parse(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text())


@pytest.mark.parametrize("file", [file for file in FILES if file not in INTERNALS])
def test_private_names_of_torch_are_in_two_modules(file):
    names = private_names(parse(file))
    assert not names, f"hf_trim/{file} uses {', '.join(sorted(names))}: reach it through hf_trim/{INTERNALS[0]}"


def test_that_private_names_are_found():
    source = """
import torch._dynamo
from torch.utils._pytree import tree_iter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn import Linear
torch._C._current_graph_task_id()
torch.nn.functional.linear
func._schema.is_mutable
getattr(node, "_forward_cls", None)
"""
    assert private_names(ast.parse(source)) == {
        "torch._dynamo.",
        "torch.utils._pytree.tree_iter",
        "torch.nn.modules.batchnorm._BatchNorm",
        "torch._C",
        "torch._C._current_graph_task_id",
        "func._schema",
        "_forward_cls",
    }
    assert all(private_names(parse(file)) for file in INTERNALS)


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("backward/")])
def test_the_backward_pass_imports_nothing_else_of_hf_trim(file):
    modules = {module for module, _ in imports(parse(file))}
    packages = {module.split(".")[0] for module in modules}
    foreign = {m for m in modules if m.split(".")[0] == "hf_trim" and not f"{m}.".startswith("hf_trim.backward.")}
    assert not foreign, f"hf_trim/{file} imports {', '.join(sorted(foreign))}"
    assert not packages & {"transformers", "accelerate", "datasets"}, "the backward pass knows torch alone"
