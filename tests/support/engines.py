"""
Trains some heads in two processes under each engine of accelerate, and saves them: `python -m tests.support.engines
FOLDER ENGINE.yaml ...`. accelerate's launcher reads the configuration. Only its last step, the start of the processes,
is ours (`forks.py`).
"""

import json
import os
import sys
import traceback
from pathlib import Path

import deepspeed
import torch.distributed.run
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import AcceleratorState, DistributedType, PartialState

from tests.support.forks import run_forks
from tests.support.heads import COUNTING, HEADS, is_believed_to_count, make
from tests.support.helpers import InOrder, InOrderAndLarger, train
from tests.support.quick import use_no_clock


# Head, and what is trimmed: of mini-batches of 8, in one process or in two.
CASES = {
    "samples": ("decoder-classification", {}),
    "accumulated": ("decoder-classification", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
    "tokens": ("llama", {}),
    "one process keeps nothing": ("decoder-classification", {"trim_keep_start": 0.1, "trim_keep_end": 0.1}),
    "everything": ("llama", {"trim_keep_start": 1.0, "trim_keep_end": 1.0}),
    "adaptive": ("decoder-classification", {"trim_schedule": "adaptive", "trim_mass": 0.7}),
    "replay": ("decoder-classification", {"trim_backward": "replay"}),
}


def run(case: str, folder: Path, processes: int):
    head, changes = CASES[case]
    arguments = {"trim_keep_start": 0.6, "trim_keep_end": 0.3, "trim_scope": "global", "max_grad_norm": 0.0, **changes}
    size = arguments.pop("per_device_train_batch_size", 8)
    if "trim_mass" in arguments:
        del arguments["trim_keep_start"], arguments["trim_keep_end"]
    rows, model = HEADS[head][1]()[:16], make(head)
    is_larger = processes == 1 and head not in COUNTING and is_believed_to_count(model, rows[0])
    trainer = train(
        model, rows, folder / case, trainer_cls=InOrderAndLarger if is_larger else InOrder,
        per_device_train_batch_size=size // processes, **arguments,
    )  # fmt: skip
    trainer.save_model()
    return trainer


def engine_of(trainer) -> str:
    """What really runs, as the test wants to know."""
    if trainer.is_fsdp_enabled:
        return f"fsdp{trainer.accelerator.state.fsdp_plugin.fsdp_version}"
    if trainer.is_deepspeed_enabled:
        return f"zero{trainer.accelerator.deepspeed_engine_wrapped.engine.zero_optimization_stage()}"
    return "ddp" if type(trainer.model_wrapped).__name__ == "DistributedDataParallel" else "none"


def allow_fsdp_on_cpu():
    """torch's FSDP2 runs on CPUs; accelerate asks for it on GPUs only, and would go on with DDP."""
    init = AcceleratorState.__init__

    def on_cpu(self, *args, **kwargs):
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        init(self, *args, **kwargs)

    AcceleratorState.__init__ = on_cpu


def train_all(folder: Path):
    """Train each case in this process, one of several."""
    use_no_clock()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        # DeepSpeed would compile its own reductions in shared memory first, for half a minute; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_cpu()
    for case in CASES:
        trainer = run(case, folder, int(os.environ["WORLD_SIZE"]))
        if trainer.is_world_process_zero():
            facts = {
                "losses": trainer.losses,
                "engine": engine_of(trainer),
                "warned": trainer._notices.backward,
            }
            (folder / case / "facts.json").write_text(json.dumps(facts))


def launch(config: Path, folder: Path):
    """What `accelerate launch --config_file CONFIG --num_processes 2` does, with forks."""
    folder.mkdir()
    options = ["--config_file", str(config), "--num_processes", "2", "-m", __name__]
    torch.distributed.run.run = lambda args: run_forks(train_all, folder, processes=int(args.nproc_per_node))
    try:
        launch_command(launch_command_parser().parse_args(options))
    except Exception:  # the other engines are run all the same
        (folder / "error.txt").write_text(traceback.format_exc())


if __name__ == "__main__":
    for config in map(Path, sys.argv[2:]):
        launch(config, Path(sys.argv[1]) / config.stem)
