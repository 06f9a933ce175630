"""`--dry_run`: what a run would do, how large it is and how long it takes. Nothing is trained, and nothing is left."""

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import datasets
import torch
from transformers import IntervalStrategy

from hf_trim.run.compare import arms_of
from hf_trim.run.recipe import Job
from hf_trim.run.trainer import RecipeTrainer, load_job_data, make_trainer
from hf_trim.trainer.arguments import TrimmingArguments
from hf_trim.trainer.schedule import keep_fraction, schedule_unit


MEASURED_BATCHES = 3
SHOWN_EPOCHS = 10


def dry_run(job: Job) -> None:
    """
    Print rows, classes and first rows of the data, the model's size, the schedule of p, the number of steps and the
    estimated time.

    Args:
        job ([`Job`]): The recipe.

    Raises:
        [`RecipeError`]: If the data or the model cannot be used.
    """
    with TemporaryDirectory() as folder, _no_cache_files():
        data = load_job_data(job)
        trainer = make_trainer(job, data, {}, job.training.seed, Path(folder))
        passes, steps = _count_steps(trainer)
        train_seconds, test_seconds = _measure(trainer)
    if job.training.process_index:
        return
    for text, label in data.examples:
        print(f"  {label + ': ' if label else ''}{text}")
    model = cast(torch.nn.Module, trainer.model)
    print(f"Model: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters.")
    print(f"Schedule: {_describe_schedule(job.training, steps)}.")
    args = trainer.args
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    epochs = steps / max(passes / args.gradient_accumulation_steps, 1)
    print(f"Steps: {steps:,} of {per_step} samples ({_count(epochs, 'epoch')}).")
    tests = (
        1
        + {"no": 0, "epoch": math.ceil(epochs), "steps": steps // max(int(args.eval_steps or steps), 1)}[
            IntervalStrategy(args.eval_strategy).value
        ]
    )
    test_seconds *= math.ceil(len(data.eval_dataset) / args.eval_batch_size) * args.eval_batch_size
    step_seconds = train_seconds * args.gradient_accumulation_steps
    total = steps * step_seconds + tests * test_seconds
    print(
        f"Time: about {_format_time(total)}: {steps:,} steps of {_format_time(step_seconds)} without trimming (with "
        f"it they take less), and {_count(tests, 'test')} of {_format_time(test_seconds)}."
    )
    if job.run.compare:
        arms, seeds = arms_of(job), job.run.seeds
        runs = len(arms) * seeds
        time_of_all = _format_time(runs * total)
        print(f"Comparison: {', '.join(arms)}, {_count(seeds, 'seed')} each: {runs} runs, about {time_of_all}.")
    print(f"Nothing was trained. Without --dry_run everything would go to {job.output_dir}.")


@contextmanager
def _no_cache_files() -> Iterator[None]:
    """`datasets` writes what it tokenizes beside the data; here into a temporary folder."""
    were_enabled = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if were_enabled:
            datasets.enable_caching()


def _count_steps(trainer: RecipeTrainer) -> tuple[int, int]:
    """Mini-batches of an epoch, and optimizer steps of the training."""
    args = trainer.args
    passes = len(trainer.get_train_dataloader())
    per_epoch = max(math.ceil(passes / args.gradient_accumulation_steps), 1)
    return passes, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)


def _describe_schedule(args: TrimmingArguments, steps: int) -> str:
    if args.trim_select == "none":
        return "nothing is trimmed"
    which = "hardest samples" if args.trim_select == "hardest" else "random samples"
    if args.trim_skip_hardest:
        which += f" but for the hardest {100 * args.trim_skip_hardest:g} % of each mini-batch"
    if args.is_adaptive:
        return f"p follows the losses; the {which} that carry {100 * args.trim_mass:g} % of the gradient mass are kept"
    start, end, most = args.trim_keep_start, args.trim_keep_end, 1 - args.trim_skip_hardest
    unit = schedule_unit(args.trim_schedule, args.num_train_epochs, args.max_steps)
    if unit == "step":
        limit = f", but is at most {most:g}," if start > most else ""
        return f"the {which}; p falls from {start:g} to {end:g}{limit} over {steps:,} steps"
    epochs = math.ceil(args.num_train_epochs)
    values = [
        min(most, keep_fraction(start, end, unit, epoch=epoch, num_epochs=epochs, step=0, num_steps=steps))
        for epoch in range(epochs)
    ]
    shown = [f"{value:.3g}" for value in values]
    if epochs > SHOWN_EPOCHS:
        shown = [*shown[:3], "…", *shown[-2:]]
    return f"the {which}; p in each epoch: {', '.join(shown)}"


def _measure(trainer: RecipeTrainer) -> tuple[float, float]:
    """Seconds of a training step of one mini-batch, and seconds of a test of one sample."""
    model = cast(torch.nn.Module, trainer.model)
    train: list[float] = []
    test: list[float] = []
    batches = iter(trainer.get_train_dataloader())
    for _ in range(1 + MEASURED_BATCHES):  # the first one is slower
        batch = next(batches, None)
        if batch is None:
            break
        size = len(batch["labels"])
        batch = {name: value.to(trainer.args.device) for name, value in batch.items()}
        model.train()
        start = _now()
        with trainer.accelerator.autocast():
            loss = model(**batch).loss
        loss.backward()
        train.append(_now() - start)
        model.zero_grad()
        model.eval()
        start = _now()
        with torch.no_grad(), trainer.accelerator.autocast():
            model(**batch)
        test.append((_now() - start) / size)
    return statistics.median(train[1:] or train), statistics.median(test[1:] or test)


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _count(number: float, what: str) -> str:
    return f"{number if isinstance(number, int) else f'{number:.3g}'} {what}{'' if number == 1 else 's'}"


def _format_time(seconds: float) -> str:
    for limit, unit, size in ((1, "ms", 1e-3), (120, "s", 1), (7200, "min", 60), (math.inf, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.2g} {unit}" if seconds / size < 10 else f"{seconds / size:.0f} {unit}"
    raise AssertionError("no time is infinite")
