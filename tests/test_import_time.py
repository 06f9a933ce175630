"""What `import hf_trim` imports, and that it repairs torchvision all the same."""

import importlib
import subprocess
import sys

import pytest

import hf_trim
from hf_trim import torchvision_cpu


def test_the_package_and_its_command_import_no_torch():
    program = """if True:
        import sys
        import hf_trim
        from hf_trim.__main__ import main
        for arguments in (["--version"], ["--help"], ["run", "--help"], ["run"], ["run", "digits-vit", "-h"]):
            assert main(arguments) == 0
        heavy = {"torch", "transformers", "datasets", "numpy", "torchvision"} & set(sys.modules)
        assert not heavy, heavy
        assert set(hf_trim.__all__) <= set(dir(hf_trim))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_each_public_name_can_be_imported():
    for name in hf_trim.__all__:
        assert getattr(hf_trim, name).__name__ == name
    assert hf_trim.TrimmingTrainer is hf_trim.trainer.TrimmingTrainer
    with pytest.raises(AttributeError, match="module 'hf_trim' has no attribute 'Trimmer'"):
        hf_trim.Trimmer  # noqa: B018


@pytest.fixture
def torchvision_of(tmp_path, monkeypatch):
    """A torchvision with this content in the place of the real one."""
    real = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "torchvision"}
    for name in real:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torchvision").mkdir()

    def write(content):
        (tmp_path / "torchvision" / "__init__.py").write_text("from torchvision import part\n" + content)
        (tmp_path / "torchvision" / "part.py").write_text("")
        return importlib.import_module("torchvision")

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]


FAKE = "import torch\ntorch.library.register_fake('torchvision::{}')(lambda x: x)\n"


def test_operators_that_torchvision_lacks_are_declared_when_it_is_imported(torchvision_of, monkeypatch):
    monkeypatch.setattr(torchvision_cpu, "_LIBRARIES", [])
    module = torchvision_of(FAKE.format("hf_trim_first") + FAKE.format("hf_trim_second") + "done = True")
    assert module.done and len(torchvision_cpu._LIBRARIES) == 2
    assert module is sys.modules["torchvision"] and "torchvision.part" in sys.modules


@pytest.mark.parametrize("content", ["raise RuntimeError('no such thing')", "raise OSError('no file')"])
def test_other_errors_of_torchvision_are_raised(content, torchvision_of):
    with pytest.raises((RuntimeError, OSError), match="no such thing|no file"):
        torchvision_of(content)
