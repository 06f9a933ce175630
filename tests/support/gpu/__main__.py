"""
`python -m tests.support.gpu --output FOLDER`: all that a GPU can show, in 8 minutes, with what is in the tree alone.

Cases by part → a process that runs them one by one → `FOLDER/gpu.json`, written anew after each → a table, printed and
in `FOLDER/gpu.md`. `--toy` runs a few of each part at toy size on the CPU.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hf_trim.files import write_json
from tests.support.gpu.process import CUT_OFF, CaseProcess, Settings
from tests.support.gpu.table import make_tables


# Up to which share of the time each part goes on. What a part leaves over is the next one's.
PARTS = {"exactness": 0.35, "speed": 0.8, "training": 1.0}
START_SECONDS = 180  # in which a process has to start
NOT_STARTED = {"status": CUT_OFF, "problem": "there was no time left to start it"}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.support.gpu", allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="A new folder for gpu.json, gpu.md and trainings.")
    parser.add_argument("--minutes", type=float, default=8.0, help="When to end, finished or not (default: 8).")
    parser.add_argument(
        "--data",
        type=Path,
        help="A folder with the four idx.gz files of Fashion-MNIST. Default: scikit-learn's digits.",
    )
    parser.add_argument("--toy", action="store_true", help="A few cases at toy size, on the CPU.")
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes must be more than 0, and is {args.minutes:g}.")
    if args.data is not None and not (args.data / "train-images-idx3-ubyte.gz").is_file():
        parser.error(
            f"--data: {args.data} has no train-images-idx3-ubyte.gz: name the folder of Fashion-MNIST's files."
        )
    if (args.output / "gpu.json").exists():
        parser.error(f"--output: {args.output} has the results of another run: name another folder.")
    return args


def run_cases(settings: Settings, minutes: float, target: Callable | None = None) -> dict | None:
    """
    Run all cases, and write what they found.

    Args:
        settings ([`Settings`]): What to run.
        minutes (`float`): When to end.
        target (`Callable`, *optional*): What the process of the cases does, as [`~tests.support.gpu.process.work`].

    Returns:
        `dict` or `None`: What `gpu.json` has; `None` if there is no GPU.
    """
    begin, path = time.monotonic(), Path(settings.output) / "gpu.json"
    process = CaseProcess(settings, target)
    greeting = process.start(min(START_SECONDS, 60 * minutes))
    if greeting is None:
        return None
    content = {"minutes": minutes, "toy": settings.toy, **greeting.facts, "parts": {part: {} for part in PARTS}}
    try:
        for part, share in PARTS.items():
            end = begin + 60 * minutes * share
            for name in greeting.cases[part]:
                left = end - time.monotonic()
                started = time.monotonic()
                result = process.run(part, name, left) if left > 1 else dict(NOT_STARTED)
                content["parts"][part][name] = {**result, "seconds": round(time.monotonic() - started, 2)}
                content["seconds"] = round(time.monotonic() - begin, 1)
                write_json(path, content)
                print(f"{content['seconds']:5.0f} s  {part}: {name}: {result['status']}", flush=True)
                if "problem" in result and left > 1:
                    print(f"         {result['problem'].strip().splitlines()[-1]}", flush=True)
    finally:
        process.end()
    return content


def main(argv: list[str] | None = None) -> int:
    """
    The command line.

    Args:
        argv (`list[str]`, *optional*): Arguments; the default is `sys.argv[1:]`.

    Returns:
        `int`: 0; 1 if a case has failed; 2 if there is no GPU. What was cut off or cannot run here is no failure.
    """
    args = parse_arguments(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    # Nothing is loaded from anywhere, and nobody waits for an answer.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    settings = Settings(str(args.output), args.toy, None if args.data is None else str(args.data.resolve()))
    content = run_cases(settings, args.minutes)
    if content is None:
        print("torch finds no CUDA device here. --toy runs a few cases at toy size on the CPU.", file=sys.stderr)
        return 2
    tables = make_tables(content)
    (args.output / "gpu.md").write_text(tables, encoding="utf-8")
    print(tables)
    return int(any(case["status"] == "failed" for cases in content["parts"].values() for case in cases.values()))


if __name__ == "__main__":
    sys.exit(main())
