"""`--dry_run`: what a run would do, how large it is and how long it takes. Nothing is trained, and nothing is left."""

import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import datasets
import torch
from transformers import IntervalStrategy

from hf_trim.messages import wrap
from hf_trim.run.arms import arms_of
from hf_trim.run.recipe import Job
from hf_trim.run.trainer import RecipeTrainer, load_job_data, make_trainer
from hf_trim.trainer.arguments import TrimmingArguments
from hf_trim.trainer.dataset_scope import dataset_fractions
from hf_trim.trainer.schedule import keep_fraction, schedule_unit


MEASURED_BATCHES = 3
SHOWN_EPOCHS = 10


def dry_run(jobs: list[Job]) -> None:
    """
    Print rows, classes and first rows of the data, the model's size, the schedule of p, the number of steps and the
    estimated time; of a grid what the comparisons differ in, and the time of all.

    Args:
        jobs (`list[Job]`): The recipe, or the comparisons of a grid.

    Raises:
        [`RecipeError`]: If the data or a model cannot be used.
    """
    shown: set[str] = set()
    times: dict[str, tuple[float, float]] = {}
    total, runs = 0.0, 0
    for number, job in enumerate(jobs, start=1):
        if len(jobs) > 1:
            _say(job, f"{number} of {len(jobs)}: {job.output_dir}", shown)
        seconds = _dry_run(job, shown, times)
        count = len(arms_of(job)) * job.run.seeds if job.run.compare else 1
        total, runs = total + seconds * count, runs + count
    if len(jobs) > 1:
        _say(jobs[0], f"All {len(jobs)} comparisons: {runs} runs, about {_format_time(total)}.")
    where = jobs[0].output_dir.parent if len(jobs) > 1 else jobs[0].output_dir
    _say(jobs[0], f"Nothing was trained. Without --dry_run everything would go to {where}.")


def _say(job: Job, text: str, shown: set[str] | None = None) -> None:
    """Print something, by one process, and once."""
    if job.training.process_index == 0 and text not in (shown or ()):
        print(wrap(text, sys.stdout), flush=True)
    if shown is not None:
        shown.add(text)


def _dry_run(job: Job, shown: set[str], times: dict[str, tuple[float, float]]) -> float:
    """Show one recipe; returns the seconds of one training."""
    training = job.training
    with TemporaryDirectory() as folder, _no_cache_files():
        data = load_job_data(job, shown)
        trainer = make_trainer(job, data, {}, training.seed, Path(folder))
        passes, steps = _count_steps(trainer)
        # Of a grid that varies the schedule, each comparison has the same steps.
        sizes = (training.train_batch_size, training.eval_batch_size, training.bf16, training.fp16)
        key = f"{job.model} {job.data} {sizes}"
        if key not in times:
            times[key] = _measure(trainer)
        train_seconds, test_seconds = times[key]
    _say(job, "\n".join(f"  {label + ': ' if label else ''}{text}" for text, label in data.examples), shown)
    model = cast(torch.nn.Module, trainer.model)
    parameters = sum(p.numel() for p in model.parameters())
    _say(job, f"Model: {type(model).__name__}, {parameters:,} parameters.", shown)
    _say(job, f"Schedule: {_describe_schedule(training, steps)}.")
    args = trainer.args
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    is_shorter = training.trims_dataset  # by epochs of fewer steps
    epochs = args.num_train_epochs if is_shorter else steps / max(passes / args.gradient_accumulation_steps, 1)
    _say(job, f"Steps: {steps:,} of {per_step} samples ({_count(epochs, 'epoch')}).", shown)
    tests = (
        1
        + {"no": 0, "epoch": math.ceil(epochs), "steps": steps // max(int(args.eval_steps or steps), 1)}[
            IntervalStrategy(args.eval_strategy).value
        ]
    )
    test_seconds *= math.ceil(len(data.eval_dataset) / args.eval_batch_size) * args.eval_batch_size
    step_seconds = train_seconds * args.gradient_accumulation_steps
    total = steps * step_seconds + tests * test_seconds
    less = "" if is_shorter else " without trimming (with it they may take less)"
    _say(
        job,
        f"Time: about {_format_time(total)}: {steps:,} steps of {_format_time(step_seconds)}{less}, and "
        f"{_count(tests, 'test')} of {_format_time(test_seconds)}.",
        shown,
    )
    if job.run.compare:
        arms, seeds = arms_of(job), job.run.seeds
        runs = len(arms) * seeds
        time_of_all = _format_time(runs * total)
        _say(
            job,
            f"Comparison: {', '.join(arms)}, {_count(seeds, 'seed')} each: {runs} runs, about {time_of_all}.",
            shown,
        )
    return total


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
    loader = trainer.get_train_dataloader()
    passes = len(loader)
    per_epoch = max(math.ceil(passes / args.gradient_accumulation_steps), 1)
    if TrimmingArguments.of(args).trims_dataset:
        return passes, trainer.plan_epochs(loader).ends()[-1]
    return passes, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)


def _describe_schedule(args: TrimmingArguments, steps: int) -> str:
    if args.trim_select == "none":
        return "nothing is trimmed"
    if args.trims_dataset:
        fractions = dataset_fractions(args.trim_keep_start, args.trim_keep_end, int(args.num_train_epochs))
        which = "hardest" if args.trim_select == "hardest" else "random"
        return f"the {which} samples of the data set; p in each epoch: {_list(fractions)}"
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
    return f"the {which}; p in each epoch: {_list(values)}"


def _list(values: list[float]) -> str:
    shown = [f"{value:.3g}" for value in values]
    return ", ".join([*shown[:3], "…", *shown[-2:]] if len(values) > SHOWN_EPOCHS else shown)


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
