"""Trains some heads in each process: `python -m torch.distributed.run ... -m tests.distributed FOLDER`."""

import json
import os
import sys
from pathlib import Path

import torch

from hf_trim import TrimmingTrainer
from tests.helpers import train, weights
from tests.test_heads import HEADS, make


TRAININGS = {
    "llama": {}, "gpt2": {}, "bart": {}, "question-answering": {}, "token-classification": {},
    "next-sentence": {"trim_backward": "replay"}, "mixtral": {}, "masked-lm": {"trim_unit": "sample"},
}  # fmt: skip


class InOrder(TrimmingTrainer):
    """Takes the data in order: mini-batch i goes to process i modulo their number."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def run(head: str, folder: Path, processes: int, keep: float):
    arguments = {"trim_start": keep, "trim_end": min(keep, 0.3), **TRAININGS[head]}
    if keep == 1:
        arguments["max_steps"] = 1
    trainer = train(
        make(head), HEADS[head][1]()[:16], folder, trainer_cls=InOrder, per_device_train_batch_size=4,
        gradient_accumulation_steps=2 // processes, num_train_epochs=1, **arguments,
    )  # fmt: skip
    return trainer.losses, weights(trainer.accelerator.unwrap_model(trainer.model))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for head in TRAININGS:
        for keep in (0.3, 1.0):
            losses, found = run(head, folder, int(os.environ["WORLD_SIZE"]), keep)
            if os.environ["RANK"] == "0":
                torch.save(found, folder / f"{head}-{keep}.pt")
                (folder / f"{head}-{keep}.json").write_text(json.dumps(losses))
    torch.distributed.destroy_process_group()
