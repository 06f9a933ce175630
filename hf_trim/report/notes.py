"""
What a reader of a table must know beside it: what so few seeds can show, and what a constant answer would score.

Records of runs of one recipe → sentences.
"""

import math

from hf_trim.report.summary import MIN_SEEDS, Summary, summarize
from hf_trim.report.verdict import verdict


def notes(records: list[dict]) -> list[str]:
    """
    Args:
        records (`list[dict]`): Records of finished runs, of one recipe with one setting.

    Returns:
        `list[str]`: Sentences to stand below their table; warnings begin with "Warning".
    """
    summaries = summarize(records)
    lines = [*_note_missing(records), *_note_failures(summaries), *_note_seeds(summaries)]
    return [*lines, *_note_majority(summaries), *_note_verdict(summaries)]


def _note_missing(records: list[dict]) -> list[str]:
    seeds_of: dict[str, set[int]] = {}
    for record in records:
        seeds_of.setdefault(record["arm"], set()).add(record["seed"])
    every = set().union(*seeds_of.values())
    lacking = [
        f"{arm} lacks {', '.join(map(str, sorted(every - seeds)))}" for arm, seeds in seeds_of.items() if every - seeds
    ]
    if not lacking:
        return []
    return [
        f"Warning: not all arms have the same seeds ({'; '.join(lacking)}), so their means are of different seeds. "
        "Differences, costs and speed-ups are those of the seeds that two arms share."
    ]


def _note_failures(summaries: list[Summary]) -> list[str]:
    failed = [summary.arm for summary in summaries if not math.isfinite(summary.mean)]
    return [f"Warning: with a training that ended in NaN or infinity: {', '.join(failed)}."] if failed else []


def _note_seeds(summaries: list[Summary]) -> list[str]:
    if all(summary.arm != "plain" for summary in summaries):
        return ["There is no plain training among the runs to compare with: add the arm plain."]
    counts = {summary.to_plain.pairs for summary in summaries if summary.to_plain is not None}
    pairs = sorted(count for count in counts if count < MIN_SEEDS)
    if not pairs:
        return []
    if pairs == [1]:
        return [f"One seed cannot tell a difference from chance: train {MIN_SEEDS} or more."]
    few = pairs[-1]  # what the most of them could show
    return [
        f"Differences of {' or '.join(map(str, pairs))} seeds have their range (lowest … highest) in square brackets, "
        f"which is no interval. Without any effect all {few} would agree in sign in 1 of {2 ** (few - 1)} "
        f"comparisons: train {MIN_SEEDS} seeds or more."
    ]


def _note_verdict(summaries: list[Summary]) -> list[str]:
    if not any(summary.to_plain is not None and summary.to_plain.interval for summary in summaries):
        return []
    return [f"Verdict: {verdict(summaries)}."]


def _note_majority(summaries: list[Summary]) -> list[str]:
    errors = [summary.majority_error for summary in summaries if summary.majority_error is not None]
    if not errors:
        return []
    lines = [describe_majority(max(errors))]
    useless = [s.arm for s in summaries if s.majority_error is not None and s.mean >= s.majority_error]
    return [*lines, f"Warning: not better than that: {', '.join(useless)}."] if useless else lines


def describe_majority(error: float) -> str:
    """
    Args:
        error (`float`): Test error in percent.

    Returns:
        `str`: A sentence that says that always the most frequent class has this error.
    """
    return f"Always the most frequent class has a test error of {error:.2f} %."
