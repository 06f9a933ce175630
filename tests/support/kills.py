"""
`python -m tests.support.kills --kills 20 --processes 2`: trains a small model, kills it at random moments, lets it go
on, and compares what it ends with, bit for bit, with a training that nobody killed.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml


RECIPE = {
    "model": {
        "model_type": "vit",
        "config_overrides": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
            "patch_size": 4, "hidden_dropout_prob": 0.1,
        },
    },
    "data": {"dataset": "digits", "max_train_samples": 320, "max_test_samples": 20, "augment": "crop"},
    "training": {
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "learning_rate": 0.002,
        "trim_schedule": "step", "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2, "logging_steps": 1,
        "trim_scope": "global", "trim_backward": "sparse", "use_cpu": True, "dataloader_num_workers": 0,
    },
}  # fmt: skip


def read_result(out: Path) -> tuple:
    """Weights, and what was logged at each step; a step that was repeated has one entry."""
    logs = json.loads((out / "trainer_state.json").read_text())["log_history"]
    names = ("step", "loss", "full_loss", "keep_fraction", "trim_threshold", "learning_rate")
    steps = [tuple(log.get(name) for name in names) for log in logs if "loss" in log]
    return (out / "model.safetensors").read_bytes(), steps


def kill_and_go_on(kills: int, train: Callable, folder: Path) -> int:
    """
    Kill trainings until `kills` kills are done, and let each go on until it ends.

    Args:
        kills (`int`): Number of kills.
        train (`Callable`): `f(recipe, out, kill)` trains a recipe in the folder `out`, from its last checkpoint. It
            returns whether the training was killed. `kill` is the number of the kill, or `None` for none.
        folder (`Path`): Where to train.

    Returns:
        `int`: Number of trainings that were killed, went on, and ended as the undisturbed one did.
    """
    recipe, undisturbed, out = folder / "small.yaml", folder / "undisturbed", folder / "killed"
    recipe.write_text(yaml.safe_dump(RECIPE))
    assert not train(recipe, undisturbed, None)
    expected, done, ended = read_result(undisturbed), 0, 0
    while done < kills or out.exists():
        if train(recipe, out, done if done < kills else None):
            done += 1
            steps = sorted(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
            print(f"kill {done}: checkpoints {steps}", flush=True)
            continue
        weights, logs = read_result(out)
        assert (weights, logs) == expected, (logs[-3:], expected[1][-3:])
        ended += 1
        print(f"ended as without kills, {len(logs)} steps", flush=True)
        shutil.rmtree(out)
    return ended


class CommandLine:
    """Trains by the real command line, which is killed with all of its processes after a random time."""

    def __init__(self, processes: int, epochs: int, seed: int):
        self.processes, self.epochs, self.random, self.seconds = processes, epochs, random.Random(seed), None

    def __call__(self, recipe: Path, out: Path, kill: int | None) -> bool:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        options = [str(recipe), "--output_dir", str(out), "--num_train_epochs", str(self.epochs)]
        command = [sys.executable, *(launcher if self.processes > 1 else []), "-m", "hf_trim.run", *options]
        environment, begin = {**os.environ, "OMP_NUM_THREADS": "1"}, time.monotonic()
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            timeout = 600 if kill is None else self.random.uniform(0.3, 1.0) * self.seconds
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
                victim.kill()
            process.communicate()
            assert kill is not None, "the training did not end"
            return True
        assert process.returncode == 0, output[-5000:]
        self.seconds = self.seconds or time.monotonic() - begin
        return False


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kill_and_go_on(args.kills, CommandLine(args.processes, args.epochs, args.seed), Path(folder))
