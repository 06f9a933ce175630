"""Tables in Markdown of what a run has found."""

from collections import Counter
from typing import Any

from tests.support.gpu.process import PASSED


def make_tables(content: dict[str, Any]) -> str:
    """
    Args:
        content (`dict`): What `gpu.json` has.

    Returns:
        `str`: Markdown: how many cases there were and what became of them, then a table of each part.
    """
    lines = [
        f"{content['hardware']}, torch {content['versions']['torch']}, {content.get('seconds', 0):.0f} s"
        + (", toy size" if content["toy"] else ""),
        "",
    ]
    for part, cases in content["parts"].items():
        counts = Counter(case["status"] for case in cases.values())
        lines.append(f"- {part}: " + (", ".join(f"{n} {status}" for status, n in counts.items()) or "no case"))
    for part, make_row in (("exactness", _exactness), ("speed", _speed), ("training", _training)):
        rows = [row for name, case in content["parts"][part].items() for row in make_row(name, case)]
        lines += ["", f"## {part.capitalize()}", "", *_table(HEADS[part], rows)]
    return "\n".join(lines) + "\n"


HEADS = {
    "exactness": ("case", "", "gradient error", "limit", "host waits beyond dense or plain"),
    "speed": ("case", "p", "mode", "step, ms", "speed-up", "bound", "peak MB", "host waits", "gradient error"),
    "training": ("case", "", "test error, %", "train time, s", "kept, by epoch"),
}


def _table(head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _state(case: dict[str, Any]) -> str:
    """What became of a case, in a cell."""
    problem = case.get("problem", "").strip().splitlines()
    return case["status"] if not problem else f"**{case['status']}**: {problem[-1][:200].replace('|', '/')}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _exactness(name: str, case: dict[str, Any]) -> list[list[str]]:
    waits = case.get("host_waits")
    if waits is not None and "expected_waits" in case:
        waits = f"{waits} of {case['expected_waits']}, plain {case['plain_waits']}"
    error, limit = (_number(case.get(key), ".0e") for key in ("gradient_error", "limit"))
    return [[name, _state(case), error, limit, "–" if waits is None else str(waits)]]


def _speed(name: str, case: dict[str, Any]) -> list[list[str]]:
    rows = []
    if case["status"] != PASSED:
        rows.append([name, "", _state(case), *["–"] * 6])
    if "liger" in case:
        whole = case["whole"]["step"]["median"]
        for mode in ("whole", "liger"):
            seconds, bytes_ = case[mode]["step"]["median"], case[mode]["peak_memory_bytes"]
            error = _number(case["gradient_error"], ".0e") if mode == "liger" else "–"
            rows.append([name, "1", mode, f"{1000 * seconds:.1f}", f"{whole / seconds:.2f}×", "–",
                         f"{bytes_ / 1e6:.0f}", "–", error])  # fmt: skip
    for step in case.get("steps", ()):
        has_bound = step["mode"].endswith(("sparse", "replay"))
        rows.append([
            name, f"{step['keep']:g}", step["mode"], f"{1000 * step['step']['median']:.1f}",
            f"{step['speedup_to_dense']:.2f}×", f"{step['bound']:.2f}×" if has_bound else "–",
            f"{step['peak_memory_bytes'] / 1e6:.0f}", _number(step["host_waits"], "d"),
            _number(step["gradient_error"] if has_bound else None, ".0e"),
        ])  # fmt: skip
    return rows


def _training(name: str, case: dict[str, Any]) -> list[list[str]]:
    kept = ", ".join(f"{100 * share:.0f}" for share in case.get("kept", ())) or "–"
    error, seconds = (_number(case.get(key), ".2f") for key in ("test_error", "train_seconds"))
    return [[name, _state(case), error, seconds, f"{kept} %" if kept != "–" else kept]]
