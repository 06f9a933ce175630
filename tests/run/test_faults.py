"""Kills, full disks, damaged checkpoints, pickles: nothing that was computed is lost, and nothing foreign is run."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from hf_trim.run.__main__ import main
from hf_trim.trainer.checkpoints import last_complete_checkpoint
from tests.run.test_run import TINY
from tests.support.kills import kill_and_go_on


def test_killed_trainings_of_two_processes_end_as_if_nothing_had_been(tmp_path):
    assert kill_and_go_on(2, processes=2, epochs=4, seed=1, folder=tmp_path) >= 1


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with the checkpoints 4, 8 and 12 of a training, and its recipe."""
    folder = tmp_path_factory.mktemp("checkpoints")
    recipe = {**TINY, "data": {**TINY["data"], "max_train_samples": 64}}
    recipe["training"] = {**TINY["training"], "save_total_limit": 3}
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
    assert main([str(checkpoints / "tiny.yaml"), "--output_dir", str(out)]) == 0
    assert (out / "model.safetensors").read_bytes() == (checkpoints / "out" / "model.safetensors").read_bytes()
    assert not made.exists()


def test_pickled_arguments_are_never_loaded(out, checkpoints, tmp_path):
    made = tmp_path / "made"
    for folder in (out, out / "checkpoint-12"):
        (folder / "training_args.bin").write_bytes(pickle.dumps(Foreign(made)))
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Foreign(made)))
    assert main([str(checkpoints / "tiny.yaml"), "--output_dir", str(out)]) == 0
    assert not made.exists()


FULL = """
import resource, signal, sys
import hf_trim.run.__main__
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
sys.exit(hf_trim.run.__main__.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("limit", [2_000, 20_000, 45_000])
def test_a_full_disk_ends_in_one_line_and_the_same_command_goes_on(limit, checkpoints, tmp_path):
    """Files may not grow beyond a limit: of the state of the trainer, of the weights, of the optimizer."""
    arguments = [str(checkpoints / "tiny.yaml"), "--output_dir", str(tmp_path / "out")]
    command = [sys.executable, "-c", FULL.format(limit=limit), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("hf_trim.run: ")]
    assert done.returncode == 1 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "A file could not be written: " in lines[0] and "goes on from the last complete checkpoint" in lines[0]
    assert main(arguments) == 0
    found = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert found == (checkpoints / "out" / "model.safetensors").read_bytes()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != limit


def test_an_output_folder_that_cannot_be_written(checkpoints, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(checkpoints / "tiny.yaml"), "--output_dir", str(tmp_path / "file" / "out")]) == 1
    error = capsys.readouterr().err
    assert "A file could not be written: [Errno 20] Not a directory" in error and "another --output_dir" in error


def test_what_was_finished_before_a_full_disk_stays(checkpoints, tmp_path):
    arguments = [str(checkpoints / "tiny.yaml"), "--compare", "--seeds", "1", "--output_dir", str(tmp_path / "out")]
    assert main(arguments) == 0
    records = tmp_path / "out" / "records"
    kept = (records / "plain-seed42.json").read_bytes()
    (records / "random-seed42.json").unlink()
    done = subprocess.run([sys.executable, "-c", FULL.format(limit=2_000), *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and "A file could not be written" in done.stderr
    assert (records / "plain-seed42.json").read_bytes() == kept
    assert main(arguments) == 0 and json.loads((records / "random-seed42.json").read_text())["arm"] == "random"
