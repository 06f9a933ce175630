"""
`python -m hf_trim.bench --trainer`: what `TrimmingTrainer` adds to a step of `Trainer` while nothing is trimmed.

A mini-batch of B samples → seconds of the same step with both trainers; B losses → seconds of selecting from them.
"""

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


WARM_UP = 2  # rounds that do not count


def synchronize(device: torch.device) -> None:
    """
    Wait until a device has done its work; a clock that does not wait measures the launches alone.

    Args:
        device (`torch.device`): The device to wait for.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize()


def time_trainers(model: nn.Module, batch: dict, repeats: int, use_cpu: bool, bf16: bool) -> dict[str, list[float]]:
    """
    Time training steps (forward and backward pass, no optimizer) of both trainers on the same model and mini-batch.
    Each round has one step of each, in random order.

    Args:
        model (`torch.nn.Module`): The model.
        batch (`dict[str, torch.Tensor]`): A mini-batch with labels.
        repeats (`int`): Number of rounds; two more warm up.
        use_cpu (`bool`): Whether to stay on the CPU.
        bf16 (`bool`): Whether to use autocast.

    Returns:
        `dict[str, list[float]]`: Seconds of each step: `"plain"` of `Trainer`, and `"trimming"` of
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
        for number in range(repeats + WARM_UP):
            random.Random(number).shuffle(order)
            for name in order:
                model.zero_grad(set_to_none=True)
                synchronize(args.device)
                start = time.perf_counter()
                trainers[name].training_step(model, dict(batch))
                synchronize(args.device)
                if number >= WARM_UP:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def summarize_overhead(seconds: dict[str, list[float]]) -> dict[str, float]:
    """
    Args:
        seconds (`dict[str, list[float]]`): What [`time_trainers`] returned.

    Returns:
        `dict[str, float]`: Medians of both, and median and quartiles of their ratio within a round.
    """
    ratios = [trimming / plain for trimming, plain in zip(seconds["trimming"], seconds["plain"], strict=True)]
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
    Time the selection of the hardest items of this process, and of all processes (`trim_scope="global"`).

    Args:
        items (`int`): Items of each process.
        repeats (`int`): Number of rounds; two more warm up.
        keep (`float`, *optional*, defaults to 0.5): The kept fraction p.

    Returns:
        `dict[str, float]`: Median seconds of `"local"` and `"global"`.
    """
    state = PartialState()
    scores = torch.rand(items, device=state.device)

    def select_globally() -> None:
        # The same communication as in a step of `TrimmingTrainer`.
        process_group = ProcessGroup(
            lambda values: gather(values[None]),
            lambda size: [size] * state.num_processes,
            state.process_index,
            state.num_processes,
            state.device,
        )
        items, _ = process_group.union(torch.stack([scores, scores, torch.ones_like(scores)], 1))
        select_items(items[:, 0], keep)

    seconds: dict[str, list[float]] = {"local": [], "global": []}
    for number in range(repeats + WARM_UP):
        for scope, select in (("local", lambda: select_items(scores, keep)), ("global", select_globally)):
            state.wait_for_everyone()
            synchronize(state.device)
            start = time.perf_counter()
            select()
            synchronize(state.device)
            if number >= WARM_UP:
                seconds[scope].append(time.perf_counter() - start)
    return {scope: median(values) for scope, values in seconds.items()}
