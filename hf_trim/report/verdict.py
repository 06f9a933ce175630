"""
What a comparison says: at the same cost, what is best?

Records of each recipe → a row of numbers, and a sentence made of them.

The rule, with "beyond chance" for a 95 % interval that leaves out zero:

1. Arms that are better than plain beyond chance: the one with the lowest metric is taken.
2. Else arms that cost less and are not worse beyond chance: shorter plain training, if it is one of them and costs no
   more; another one only if it is better than that, or clearly cheaper; of several the cheapest.
3. Else plain training.

Arms are judged on the same seeds: one that has fewer than others is not, and neither is one with a training that ended
in NaN or infinity; both are said. Nothing is taken where no arm is better than always the most frequent class.

e.g. adaptive at 80 % of the cost differs from plain by −0.1 (−0.4 … +0.2), and shorter plain training at the same cost
by +0.9 (+0.5 … +1.3): "take adaptive: as plain within chance (−0.10, at worst +0.20), at 80 % of its cost".
"""

import math
from typing import cast

from hf_trim.messages import signed
from hf_trim.report.summary import MIN_SEEDS, TITLES, Summary, summarize
from hf_trim.report.tables import format_cost, format_difference, format_number
from hf_trim.run.records import metric_name


SAVES = 0.98  # an arm whose cost is below this share of plain training's is cheaper
CLEARLY = 0.05  # by how much of plain training's cost an arm must be cheaper than shorter plain training
SHOWN = ("trimmed", "adaptive", "short")  # the arms of the table; all of them are in the plot


def verdict(summaries: list[Summary]) -> str:
    """
    Args:
        summaries (`list[Summary]`): The arms of one recipe with one setting.

    Returns:
        `str`: Which arm to take, and why.
    """
    if all(arm.arm != "plain" for arm in summaries):
        return "no plain training to compare with: no verdict"
    if any(arm.arm == "plain" and not math.isfinite(arm.mean) for arm in summaries):
        return "plain training ended in NaN or infinity: no verdict"
    pairs = {arm.arm: arm.to_plain.pairs if arm.to_plain is not None else 0 for arm in summaries if arm.arm != "plain"}
    most = max(pairs.values(), default=0)
    if most < MIN_SEEDS:
        return f"fewer than {MIN_SEEDS} seeds: no verdict"
    if all(arm.majority_error is not None and arm.mean >= arm.majority_error for arm in summaries):
        return "no arm is better than always the most frequent class: no verdict"
    failed = [arm.arm for arm in summaries if not math.isfinite(arm.mean)]
    left = [arm for arm, count in pairs.items() if count < most and arm not in failed]
    said = f"; not judged, with fewer seeds: {', '.join(left)}" if left else ""
    said += f"; not judged, since a training ended in NaN or infinity: {', '.join(failed)}" if failed else ""
    return _judge([arm for arm in summaries if arm.arm not in [*left, *failed]]) + said


def _judge(summaries: list[Summary]) -> str:
    """The verdict on plain training and arms with as many seeds."""
    compared = [(arm, arm.to_plain) for arm in summaries if arm.to_plain is not None and arm.to_plain.interval]
    better = [(arm, difference) for arm, difference in compared if difference.is_lower]
    if better:
        best, difference = min(better, key=lambda pair: pair[1].mean)
        return f"take {best.arm}: better than plain, by {signed(difference.mean)}{_at_cost(best)}"
    same = {
        arm.arm: (arm, difference)
        for arm, difference in compared
        if not difference.is_higher and arm.cost is not None and arm.cost < SAVES
    }
    if not same and any(arm.cost is None for arm, _ in compared):
        return "take plain: no arm is better, and the records do not say what each of them cost"
    if not same:
        return "take plain: no arm is better, and none is cheaper without harm"
    short = same.pop("short", None)
    worthy = [pair for pair in same.values() if short is None or _beats(pair[0], short[0])]
    best, difference = min(worthy, key=lambda pair: pair[0].cost or 0.0) if worthy or short is None else short
    _, worst = cast(tuple[float, float], difference.interval)  # all that are compared have one
    within = f"{signed(difference.mean)}, at worst {signed(worst)}"
    return f"take {best.arm}: as plain within chance ({within}){_at_cost(best)}"


def _beats(arm: Summary, short: Summary) -> bool:
    """Whether an arm is worth more than simply to train for fewer epochs."""
    is_better = arm.to_short is not None and arm.to_short.is_lower
    return is_better or (arm.cost or 1) < (short.cost or 1) - CLEARLY


def _at_cost(arm: Summary) -> str:
    cost = "" if arm.cost is None else f", at {format_cost(arm)} of its cost"
    if arm.speedup is None:
        return cost
    some = "" if arm.speedup_seeds == arm.runs else f" ({arm.speedup_seeds} of {arm.runs} seeds timed)"
    return f"{cost}, {arm.speedup:.2f}× as fast{some}"


def verdict_rows(groups: dict[str, list[dict]]) -> tuple[list[str], list[list[str]]]:
    """
    Args:
        groups (`dict[str, list[dict]]`): What [`~hf_trim.report.group`] returned.

    Returns:
        `tuple[list[str], list[list[str]]]`: Head and rows, one a group, as text.
    """
    metrics = {TITLES[metric_name(records[0])] for records in groups.values()}
    head = ["runs of", "seeds", f"plain, {' or '.join(sorted(metrics))}"]
    head += [f"{arm}; cost, speed-up; difference to plain" for arm in SHOWN]
    head += ["adaptive to short", "verdict"]
    rows = []
    for title, records in groups.items():
        summaries = summarize(records)
        arms = {summary.arm: summary for summary in summaries}
        plain, adaptive = arms.get("plain"), arms.get("adaptive")
        row = [title, str(max(arm.runs for arm in arms.values())), format_number(plain.mean if plain else None)]
        row += [_describe(arms.get(arm)) for arm in SHOWN]
        row += [format_difference(adaptive.to_short if adaptive else None), verdict(summaries)]
        rows.append(row)
    return head, rows


def _describe(arm: Summary | None) -> str:
    if arm is None:
        return "–"
    speedup = "" if arm.speedup is None else f", {arm.speedup:.2f}×"
    return f"{format_number(arm.mean)}; {format_cost(arm)}{speedup}; {format_difference(arm.to_plain)}"
