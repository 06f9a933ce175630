"""`python -m hf_trim.bench --trainer`: what `TrimmingTrainer` adds to a step of `Trainer` while nothing is trimmed."""

import random
import tempfile
import time
from statistics import median, quantiles

import torch
from accelerate import PartialState
from torch import nn
from transformers import Trainer

from hf_trim._compat import gather
from hf_trim.trainer.arguments import TrimmingArguments
from hf_trim.trainer.process_group import ProcessGroup
from hf_trim.trainer.selection import select_items
from hf_trim.trainer.trainer import TrimmingTrainer


def synchronize(device: torch.device) -> None:
    """
    Wait for the device.

    Args:
        device (`torch.device`): Where the work is done.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize()


def time_trainers(model: nn.Module, batch: dict, repeats: int, use_cpu: bool, bf16: bool) -> dict[str, list[float]]:
    """
    Time training steps (forward and backward pass, no optimizer) of both trainers on the same model and mini-batch, in
    random order, one of each a round.

    Args:
        model (`torch.nn.Module`): The model.
        batch (`dict[str, torch.Tensor]`): A mini-batch with labels.
        repeats (`int`): Number of rounds; two more warm up.
        use_cpu (`bool`): Whether to stay on the CPU.
        bf16 (`bool`): Whether to use autocast.

    Returns:
        `dict[str, list[float]]`: Seconds of each step of `"plain"`, `Trainer`, and of `"trimming"`,
        [`~hf_trim.TrimmingTrainer`] with p = 1.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = TrimmingArguments(
            folder, trim_keep_end=0.5, use_cpu=use_cpu, bf16=bf16, report_to="none", disable_tqdm=True
        )
        trainers = {"plain": Trainer(model, args), "trimming": TrimmingTrainer(model, args)}
        for trainer in trainers.values():
            trainer.current_gradient_accumulation_steps = 1
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        order = list(trainers)
        for number in range(repeats + 2):
            random.Random(number).shuffle(order)
            for name in order:
                model.zero_grad(set_to_none=True)
                synchronize(args.device)
                start = time.perf_counter()
                trainers[name].training_step(model, dict(batch))
                synchronize(args.device)
                if number >= 2:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def overhead(seconds: dict[str, list[float]]) -> dict[str, float]:
    """
    Args:
        seconds (`dict[str, list[float]]`): What [`time_trainers`] returned.

    Returns:
        `dict[str, float]`: Medians, and median and quartiles of the ratio round by round.
    """
    ratios = [ours / plain for ours, plain in zip(seconds["trimming"], seconds["plain"], strict=True)]
    low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "plain_seconds": median(seconds["plain"]),
        "trimming_seconds": median(seconds["trimming"]),
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
    }


def time_selection(items: int, repeats: int, keep: float = 0.5) -> dict[str, float]:
    """
    Time the choice of the hardest among the items of this process, and among those of all (`trim_scope="global"`).

    Args:
        items (`int`): Items of each process.
        repeats (`int`): Number of rounds; two more warm up.
        keep (`float`, *optional*, defaults to 0.5): Fraction p.

    Returns:
        `dict[str, float]`: Median seconds of `"local"` and `"global"`.
    """
    state = PartialState()
    scores = torch.rand(items, device=state.device)

    def choose_among_all() -> None:
        process_group = ProcessGroup(lambda values: gather(values[None]), state.process_index)
        process_group.sum([scores.sum()])
        everything, _ = process_group.union(scores)
        select_items(everything, keep)
        process_group.sum([scores.sum()] * 3)

    seconds: dict[str, list[float]] = {"local": [], "global": []}
    for number in range(repeats + 2):
        for name, choose in (("local", lambda: select_items(scores, keep)), ("global", choose_among_all)):
            state.wait_for_everyone()
            synchronize(state.device)
            start = time.perf_counter()
            choose()
            synchronize(state.device)
            if number >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}
