"""Kills, full disks, damaged checkpoints, pickles: nothing that was computed is lost, and nothing foreign is run."""

import json
import os
import pickle
import resource
import shutil
import signal

import pytest
import torch
import yaml

from hf_trim.run.__main__ import main
from hf_trim.trainer.checkpoints import last_complete_checkpoint
from tests.support.forked import Forked, distributed_environments
from tests.support.kills import kill_and_go_on
from tests.support.recipes import TINY


# In the middle of an epoch, two steps after a checkpoint; and while a checkpoint is written.
KILLS = [("step", 8), ("save", 12)]


def train_in_two_processes(recipe, out, kill):
    kill = None if kill is None else KILLS[kill]
    options = (recipe, "--output_dir", out, "--num_train_epochs", "2")
    processes = [
        Forked("hf_trim.run", *options, environment=environment, kill=kill)
        for environment in distributed_environments(2)
    ]
    status, output = processes[0].finish()
    if kill is not None:
        processes[1].process.kill()  # it would wait for the first
        processes[1].finish()
        assert status == -signal.SIGKILL, output[-5000:]
        return True
    assert (status, processes[1].finish()[0]) == (0, 0), output[-5000:]
    return False


@pytest.mark.extended
def test_killed_trainings_of_two_processes_end_as_if_nothing_had_been(tmp_path, capsys):
    assert kill_and_go_on(len(KILLS), train_in_two_processes, tmp_path) == 1
    # The third checkpoint before the half-written one is deleted.
    assert capsys.readouterr().out.splitlines() == [
        "kill 1: checkpoints [3, 6]",
        "kill 2: checkpoints [6, 9, 12]",
        "ended as without kills, 20 steps",
    ]


@pytest.fixture(autouse=True)
def quick(no_plots):
    """No test looks at plots."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with the checkpoints 4, 8 and 12 of a training, and its recipe."""
    folder = tmp_path_factory.mktemp("checkpoints")
    recipe = {**TINY, "training": {**TINY["training"], "save_total_limit": 3}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    assert main([str(folder / "tiny.yaml"), "--output_dir", str(folder / "out")]) == 0
    return folder


@pytest.fixture
def out(checkpoints, tmp_path):
    """The same, interrupted before its end."""
    shutil.copytree(checkpoints / "out", tmp_path / "out")
    for name in ("all_results.json", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    return tmp_path / "out"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(bytes(content))


class Foreign:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "file, damage, reason",
    [
        ("model.safetensors", cut, "model.safetensors: "),
        ("optimizer.pt", cut, "optimizer.pt: "),
        ("optimizer.pt", flip, "is damaged"),
        ("scheduler.pt", cut, "scheduler.pt: "),
        ("rng_state.pth", cut, "rng_state.pth: "),
        ("trainer_state.json", cut, "trainer_state.json is missing or torn"),
        ("optimizer.pt", "foreign", "optimizer.pt: "),
        ("rng_state.pth", "foreign", "rng_state.pth: "),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(file, damage, reason, out, checkpoints, tmp_path, caplog):
    newest, made = out / "checkpoint-12", tmp_path / "made"
    if damage == "foreign":
        torch.save(Foreign(made), newest / file)
    else:
        damage(newest / file)
    assert last_complete_checkpoint(out) == str(out / "checkpoint-8")
    assert "checkpoint-12 is not complete" in caplog.text and reason in caplog.text
    assert not made.exists()
    if (file, damage) == ("optimizer.pt", flip):  # the training goes on from the one before, whatever the damage is
        assert main([str(checkpoints / "tiny.yaml"), "--output_dir", str(out)]) == 0
        assert (out / "model.safetensors").read_bytes() == (checkpoints / "out" / "model.safetensors").read_bytes()


def test_pickled_arguments_are_never_loaded(out, checkpoints, tmp_path):
    made = tmp_path / "made"
    for folder in (out, out / "checkpoint-12"):
        (folder / "training_args.bin").write_bytes(pickle.dumps(Foreign(made)))
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Foreign(made)))
    assert main([str(checkpoints / "tiny.yaml"), "--output_dir", str(out)]) == 0
    assert not made.exists()


@pytest.mark.parametrize(
    "limit",
    [pytest.param(2_000, marks=pytest.mark.extended), pytest.param(20_000, marks=pytest.mark.extended), 45_000],
)
def test_a_full_disk_ends_in_one_line_and_the_same_command_goes_on(limit, checkpoints, tmp_path):
    """Files may not grow beyond a limit: of the state of the trainer, of the weights, of the optimizer."""
    arguments = [str(checkpoints / "tiny.yaml"), "--output_dir", str(tmp_path / "out")]
    status, output = Forked("hf_trim.run", *arguments, file_size=limit).finish()
    lines = [line for line in output.splitlines() if line.startswith("hf-trim: ")]
    assert status == 1 and len(lines) == 1 and "Traceback" not in output, output[-3000:]
    assert "A file could not be written: " in lines[0] and "goes on from the last complete checkpoint" in lines[0]
    assert main(arguments) == 0
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert weights == (checkpoints / "out" / "model.safetensors").read_bytes()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != limit


@pytest.mark.parametrize("options", [[], ["--compare", "--seeds", "1"], "grid"])
def test_an_output_folder_that_cannot_be_made(options, checkpoints, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    recipe = str(checkpoints / "tiny.yaml")
    if options == "grid":
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"recipes": [recipe]}))
        recipe, options = str(tmp_path / "grid.yaml"), []
    for folder, reason in (("/proc/nope/x", "No such file or directory"), (tmp_path / "file" / "x", "Not a directory"),
                           (tmp_path / ("x" * 300), "File name too long")):  # fmt: skip
        assert main([recipe, "--output_dir", str(folder), *options]) == 2
        printed = capsys.readouterr()
        assert f"output_dir {folder}" in printed.err and f"cannot be made: {reason}" in printed.err
        assert printed.err.count("\n") == 1 and not printed.out
    assert len(list(tmp_path.iterdir())) <= 2


@pytest.mark.extended
def test_what_was_finished_before_a_full_disk_stays(checkpoints, tmp_path):
    arguments = [str(checkpoints / "tiny.yaml"), "--compare", "--seeds", "1", "--output_dir", str(tmp_path / "out")]
    arguments += ["--arms", "plain", "trimmed", "random"]
    assert main(arguments) == 0
    records = tmp_path / "out" / "records"
    kept = (records / "plain-seed42.json").read_bytes()
    (records / "random-seed42.json").unlink()
    status, output = Forked("hf_trim.run", *arguments, file_size=2_000).finish()
    assert status == 1 and "A file could not be written" in output
    assert (records / "plain-seed42.json").read_bytes() == kept
    assert main(arguments) == 0 and json.loads((records / "random-seed42.json").read_text())["arm"] == "random"
