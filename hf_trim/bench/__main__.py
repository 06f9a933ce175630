"""
`python -m hf_trim.bench`: time, memory and gradients of a training step, for each backward pass and each p.

Arguments → model and batch → kinds of steps → checks and times → summary → table and JSON file.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import HfArgumentParser

from hf_trim.backward._compile_internals import reset_compiler
from hf_trim.backward.tape.extension import EXTENSION
from hf_trim.bench.arguments import TOKEN_MODELS, BenchArguments
from hf_trim.bench.checks import check_steps
from hf_trim.bench.models import build_model, make_batch
from hf_trim.bench.steps import COMPILED, UNTRIMMED, StepKind, Steps, TokenSteps, time_steps
from hf_trim.bench.summary import predict_schedule_speedup, summarize
from hf_trim.bench.tables import make_table
from hf_trim.bench.trainer import summarize_overhead, time_selection, time_trainers
from hf_trim.environment import hardware, versions
from hf_trim.files import write_json
from hf_trim.processes import leave_process_group
from hf_trim.report import print_wide


def bench_model(name: str, args: BenchArguments) -> dict:
    """
    Measure one model, and print its table.

    Args:
        name (`str`): One of `MODEL_CHOICES`.
        args ([`~hf_trim.bench.arguments.BenchArguments`]): What to measure.

    Returns:
        `dict`: The model's part of the JSON file; times in seconds.
    """
    reset_compiler()  # models share code, and torch compiles a limited number of variants of it
    model = build_model(name, args)
    batch = make_batch(model.config, args)
    if name in TOKEN_MODELS:
        steps: Steps = TokenSteps(model, batch, args.dtype)
        modes = [mode for mode in args.modes if mode != "replay"]  # replay repeats samples, not tokens
    else:
        steps, modes = Steps(model, batch, args.dtype), args.modes
        if args.torch_compile:
            modes = [*modes, *(COMPILED + mode for mode in modes)]
    kinds = [UNTRIMMED, *(StepKind(mode, keep) for keep in args.keep for mode in modes)]
    checks = check_steps(steps, kinds)
    dense, rows = summarize(time_steps(steps, kinds, args.repeats), steps.size)
    result: dict = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dense_seconds": dense,
        "steps": [{**row, **check} for row, check in zip(rows, checks.values(), strict=True)],
        "schedule_speedup": predict_schedule_speedup(rows, args.schedule_epochs),
    }
    print_wide(make_table(name, result, args))
    for row in result["steps"]:
        for op, count in row["fallbacks"].items():
            print(f"{name}, p = {row['keep']:g}: {op} ran dense {count} times.", file=sys.stderr)
    return result


def bench_trainer(name: str, args: BenchArguments) -> dict:
    """
    Measure what `TrimmingTrainer` adds to a step while nothing is trimmed, and print it.

    Args:
        name (`str`): One of `MODEL_CHOICES`.
        args ([`~hf_trim.bench.arguments.BenchArguments`]): What to measure.

    Returns:
        `dict`: The model's part of the JSON file; times in seconds.
    """
    model = build_model(name, args)
    batch = make_batch(model.config, args)
    seconds = time_trainers(model, batch, args.repeats, args.device == "cpu", args.dtype == "bfloat16")
    result: dict = summarize_overhead(seconds)
    print(
        f"{name}: Trainer {1000 * result['plain_seconds']:.1f} ms, TrimmingTrainer at p = 1 "
        f"{1000 * result['trimming_seconds']:.1f} ms a step: {result['ratio']:.3f}× (quartiles "
        f"{result['ratio_low']:.3f} … {result['ratio_high']:.3f})"
    )
    if PartialState().num_processes > 1:
        result["selection"] = time_selection(args.batch_size, args.repeats)
        print(", ".join(f"{scope} choice {1e6 * value:.0f} µs" for scope, value in result["selection"].items()))
    return result


def main(argv: list[str] | None = None) -> int:
    """
    The command line. The JSON file is written anew after each model.

    Args:
        argv (`list[str]`, *optional*): Arguments; the default is `sys.argv[1:]`.

    Returns:
        `int`: Exit status 0; with wrong arguments the process exits with 2.
    """
    arguments: Any = BenchArguments  # transformers' type of a dataclass takes none
    parser = HfArgumentParser(arguments, prog="python -m hf_trim.bench", allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except ValueError as error:
        parser.error(str(error))
    EXTENSION.get(wait=True)
    settings = {name: value for name, value in asdict(args).items() if name != "output"}
    results: dict = {}
    content = {"arguments": settings, "hardware": hardware(), "versions": versions(), "models": results}
    for name in args.models:
        results[name] = bench_trainer(name, args) if args.trainer else bench_model(name, args)
        write_json(Path(args.output), content)
    return 0


if __name__ == "__main__":
    status = main()
    leave_process_group()
    sys.exit(status)
