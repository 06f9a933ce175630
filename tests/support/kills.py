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
        "trim_scope": "global", "use_cpu": True, "dataloader_num_workers": 0,
    },
}  # fmt: skip


def start(recipe: Path, out: Path, processes: int, epochs: int) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    options = [str(recipe), "--output_dir", str(out), "--num_train_epochs", str(epochs)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "hf_trim.run", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-5000:]


def result(out: Path) -> tuple:
    """Weights, and what was logged of each step; of a step that was repeated, all times."""
    logs = json.loads((out / "trainer_state.json").read_text())["log_history"]
    names = ("step", "loss", "full_loss", "keep_fraction", "trim_threshold", "learning_rate")
    steps = [tuple(log[name] for name in names) for log in logs if "loss" in log]
    return (out / "model.safetensors").read_bytes(), steps


def kill_and_go_on(kills: int, processes: int, epochs: int, seed: int, folder: Path, tell=print) -> int:
    """Returns the number of trainings that were killed, went on and ended as they should."""
    recipe, whole, out = folder / "small.yaml", folder / "whole", folder / "killed"
    recipe.write_text(yaml.safe_dump(RECIPE))
    begin = time.monotonic()
    finish(start(recipe, whole, processes, epochs))
    seconds, expected = time.monotonic() - begin, result(whole)
    draw, done, ended = random.Random(seed), 0, 0
    while done < kills:
        process = start(recipe, out, processes, epochs)
        try:
            output, _ = process.communicate(timeout=draw.uniform(0.3, 1.0) * seconds)
            assert process.returncode == 0, output[-5000:]
        except subprocess.TimeoutExpired:
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.kill()  # SIGKILL, for the launcher and all of its processes
            process.communicate()
            done += 1
            steps = sorted(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
            tell(f"kill {done}: checkpoints {steps}", flush=True)
            if done < kills:
                continue
            finish(start(recipe, out, processes, epochs))
        found = result(out)
        assert found == expected, (found[1][-3:], expected[1][-3:])
        ended += 1
        tell(f"ended as without kills, {len(found[1])} steps", flush=True)
        shutil.rmtree(out)
    return ended


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kill_and_go_on(args.kills, args.processes, args.epochs, args.seed, Path(folder))
