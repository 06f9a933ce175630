"""Trains some heads in two and in three processes: `python -m tests.support.distributed FOLDER`."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from hf_trim import TrimmingTrainer
from tests.support.forks import run_forks
from tests.support.heads import COUNTING, HEADS, is_believed_to_count, make
from tests.support.helpers import InOrder, InOrderAndLarger, digits, tiny_vit, train, weights


TRAININGS = {
    "llama": {}, "gpt2": {}, "bart": {}, "question-answering": {}, "token-classification": {},
    "next-sentence": {"trim_backward": "replay"}, "mixtral": {}, "masked-lm": {"trim_unit": "sample"},
}  # fmt: skip


def run(head: str, folder: Path, processes: int, keep: float):
    """Two processes take turns at the mini-batches that one accumulates."""
    arguments = {"trim_keep_start": keep, "trim_keep_end": min(keep, 0.3), **TRAININGS[head]}
    if keep == 1:
        arguments["max_steps"] = 1
    return finish(head, 16, folder, 4, gradient_accumulation_steps=2 // processes, num_train_epochs=1, **arguments)


# Of the choice among all processes: head, processes, samples, samples of a process's mini-batch, what else.
GLOBAL = {
    "tokens, accumulated": ("llama", 2, 16, 4, {"gradient_accumulation_steps": 2}),
    "tokens of texts": ("masked-lm", 2, 16, 4, {"trim_unit": "sample"}),
    "labels": ("token-classification", 2, 16, 4, {}),
    "adaptive, tokens": (
        "llama", 2, 12, 4,
        {
            "gradient_accumulation_steps": 2, "accelerator_config": {"even_batches": False},
            "trim_schedule": "adaptive", "trim_mass": 0.7,
        },
    ),
    "samples": ("question-answering", 2, 16, 4, {"gradient_accumulation_steps": 2}),
    "random": ("question-answering", 2, 16, 4, {"trim_select": "random"}),
    "replay": ("next-sentence", 2, 16, 4, {"trim_backward": "replay"}),
    "compiled": (
        "decoder-classification", 2, 16, 4,
        {"torch_compile": True, "torch_compile_backend": "aot_eager", "trim_backward": "sparse", "trim_strict": True},
    ),
    "one process keeps nothing": ("next-sentence", 2, 16, 4, {"trim_keep_start": 0.1, "trim_keep_end": 0.1}),
    "replay, one process keeps nothing": (
        "next-sentence", 2, 16, 4, {"trim_keep_start": 0.1, "trim_keep_end": 0.1, "trim_backward": "replay"}
    ),
    "fewer mini-batches in one": (
        "llama", 2, 12, 4, {"gradient_accumulation_steps": 2, "accelerator_config": {"even_batches": False}},
    ),
    "random, fewer mini-batches in one": (
        "llama", 2, 12, 4,
        {"gradient_accumulation_steps": 2, "accelerator_config": {"even_batches": False}, "trim_select": "random"},
    ),
    "three processes, the last one with less": (
        "llama", 3, 16, 2, {"gradient_accumulation_steps": 3, "accelerator_config": {"even_batches": False}}
    ),
    "three processes, filled up": ("question-answering", 3, 16, 2, {}),
}  # fmt: skip


def run_global(case: str, folder: Path, processes: int):
    """The processes take parts of the mini-batches that one takes as a whole."""
    head, planned, samples, size, changes = GLOBAL[case]
    arguments = {"trim_keep_start": 0.6, "trim_keep_end": 0.3, "num_train_epochs": 2, **changes}
    if "trim_mass" in arguments:
        del arguments["trim_keep_start"], arguments["trim_keep_end"]
    if processes == 1:
        samples = samples + 2 if case == "three processes, filled up" else samples  # with its first ones, again
        size = size * planned
        # A compiled model in several processes learns what an eager one learns alone.
        arguments = {name: value for name, value in arguments.items() if not name.startswith("torch_compile")}
        if head not in COUNTING and is_believed_to_count(make(head), HEADS[head][1]()[0]):
            assert planned == InOrderAndLarger.processes
            arguments["trainer_cls"] = InOrderAndLarger
    return finish(head, samples, folder, size, trim_scope="global", **arguments)


def finish(head: str, samples: int, folder: Path, size: int, trainer_cls=InOrder, **arguments):
    rows = HEADS[head][1]()
    rows = [rows[i % 16] for i in range(samples)]
    trainer = train(make(head), rows, folder, trainer_cls=trainer_cls, per_device_train_batch_size=size, **arguments)
    return trainer.losses, weights(trainer.accelerator.unwrap_model(trainer.model))


def write(folder: Path, name: str, losses: list, parameters: torch.Tensor):
    if os.environ["RANK"] == "0":
        torch.save(parameters, folder / f"{name}.pt")
        (folder / f"{name}.json").write_text(json.dumps(losses))


# Of the memory of losses: samples, arguments. A learning rate of 0 gives a sample the same loss whenever it is seen.
STILL = {"learning_rate": 0.0}
REMEMBERED = {
    "filled up": {**STILL},
    "the last one with less": {**STILL, "accelerator_config": {"even_batches": False}},
    "shared mini-batches": {**STILL, "accelerator_config": {"split_batches": True}},
    "read often": {"logging_steps": 1},
    "read once": {"logging_steps": 100},
}
REMEMBERED_ROWS = 43  # the last mini-batches are filled up with the first samples, if at all


def remember_all(folder: Path):
    """Each process writes the table that it has."""
    rows, rank = digits(REMEMBERED_ROWS), os.environ["RANK"]
    for case, arguments in REMEMBERED.items():
        trainer = train(tiny_vit(), rows, folder, trim_memory=True, **arguments)
        np.savez(folder / f"{case}-{rank}.npz", **trainer.trim_memory.to_dict())
    try:
        train(tiny_vit(), rows, folder, trim_memory=True, accelerator_config={"dispatch_batches": True})
    except ValueError as error:
        (folder / f"refused-{rank}.txt").write_text(str(error))


class DrawnTrainer(TrimmingTrainer):
    """Notes which samples each epoch has."""

    def _run_epoch(self, **kwargs):
        super()._run_epoch(**kwargs)
        self.drawn = [*getattr(self, "drawn", []), self._scope.sampler.chosen.tolist()]


def choose_all(folder: Path):
    """`trim_scope="dataset"`: each process writes which samples it believes to be those of each epoch."""
    trainer = train(
        tiny_vit(), digits(REMEMBERED_ROWS), folder, trainer_cls=DrawnTrainer, trim_scope="dataset", trim_refresh=1,
        num_train_epochs=4,
    )  # fmt: skip
    seen = trainer.trim_memory.to_dict()["seen"].tolist()
    said = {"drawn": trainer.drawn, "steps": trainer.state.global_step, "seen": seen}
    (folder / f"dataset-{os.environ['RANK']}.json").write_text(json.dumps(said))


def train_all(folder: Path, processes: int):
    if processes == 2:
        remember_all(folder)
        choose_all(folder)
    for head in TRAININGS if processes == 2 else ():
        for keep in (0.3, 1.0):
            write(folder, f"{head}-{keep}", *run(head, folder, processes, keep))
    for case in GLOBAL:
        if GLOBAL[case][1] == processes:
            write(folder, case, *run_global(case, folder, processes))


if __name__ == "__main__":
    for processes in (2, 3):
        run_forks(train_all, Path(sys.argv[1]), processes, processes=processes)
