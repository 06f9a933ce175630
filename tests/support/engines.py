"""
Trains some heads under the engine that accelerate's launcher names, and saves them: `accelerate launch --config_file
recipes/accelerate/ENGINE.yaml -m tests.support.engines FOLDER`.
"""

import gc
import json
import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, DistributedType, PartialState

from hf_trim.processes import leave_process_group
from tests.support.distributed import InOrder
from tests.support.heads import HEADS, make
from tests.support.helpers import train


# Head, and what is trimmed: of mini-batches of 8, in one process or in two.
CASES = {
    "samples": ("decoder-classification", {}),
    "accumulated": ("decoder-classification", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
    "tokens": ("llama", {}),
    "one process keeps nothing": ("decoder-classification", {"trim_keep_start": 0.1, "trim_keep_end": 0.1}),
    "everything": ("llama", {"trim_keep_start": 1.0, "trim_keep_end": 1.0}),
    "replay": ("decoder-classification", {"trim_backward": "replay"}),
}


def run(case: str, folder: Path, processes: int):
    head, more = CASES[case]
    arguments = {"trim_keep_start": 0.6, "trim_keep_end": 0.3, "trim_scope": "global", "max_grad_norm": 0.0, **more}
    size = arguments.pop("per_device_train_batch_size", 8)
    trainer = train(
        make(head), HEADS[head][1]()[:16], folder / case, trainer_cls=InOrder,
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


def leave_kernels_out():
    """DeepSpeed would compile its own reductions in shared memory first, for half a minute; gloo does the same."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


if __name__ == "__main__":
    gc.freeze()  # as in conftest.py
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        leave_kernels_out()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_cpu()
    folder = Path(sys.argv[1])
    for case in CASES:
        trainer = run(case, folder, int(os.environ["WORLD_SIZE"]))
        if trainer.is_world_process_zero():
            found = {"losses": trainer.losses, "engine": engine_of(trainer), "told": [*map(list, trainer._warned)]}
            (folder / case / "found.json").write_text(json.dumps(found))
    leave_process_group()
