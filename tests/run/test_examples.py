"""The scripts in `recipes/examples/` run, and p falls in them."""

import re
import runpy
import subprocess
import sys

import pytest

from hf_trim.run.recipe import recipe_folder


FOLDER = recipe_folder() / "examples"


def check(output, p_of_epochs):
    lines = re.findall(r"^epoch (\d+): p (\S+), test error (\S+) %", output, re.MULTILINE)
    assert [(int(epoch), float(p)) for epoch, p, _ in lines] == list(enumerate(p_of_epochs, start=1))
    return [float(error) for *_, error in lines]


@pytest.mark.parametrize("name, fractions", [("plain_loop", [1.0, 0.6, 0.2]), ("timm_mixup", [1.0, 0.2])])
def test_loops_on_digits(name, fractions, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [name, "--epochs", str(len(fractions))])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    errors = check(capsys.readouterr().out, fractions)
    if name == "plain_loop":
        assert errors[-1] < errors[0]


@pytest.mark.extended
@pytest.mark.parametrize("launch", [[], ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]])
def test_the_loop_with_accelerate(launch):
    options = ["--epochs", "2", "--max_train_samples", "64", "--max_test_samples", "20"]
    command = [sys.executable, *launch, str(FOLDER / "accelerate_loop.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check(done.stdout, [1.0, 0.2])
