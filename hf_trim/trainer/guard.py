"""
Step 5 (logs) of: batch → per-item losses → keep decision → trimmed backward → logs.

Signs that trimming does harm, read from the training's logs alone, so that a resumed training sees them, too. For
example, a mean loss over all items (`full_loss`) of 2.1, 1.6, 1.4 and 1.7, while p falls from 1.0 to 0.4: the items
that are left out are being unlearnt.
"""

import statistics
from itertools import accumulate
from typing import Any


def _windows(values: list[float]) -> tuple[int, float]:
    """
    How many logs to average over, and by how much two such averages may differ by chance: 4 standard errors, since the
    lowest of many is looked at, again and again. The noise is how far a log is off the line of its neighbours.
    """
    size = max(1, len(values) // 4)
    bends = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    # A normal variable has a median distance of 0.67 and a mean one of 0.8 standard deviations; a bend √6 times that.
    noise = statistics.median(bends) / 0.67 if len(values) < 16 else statistics.fmean(bends) / 0.8
    return size, 4 * noise / 6**0.5 * (2 / size) ** 0.5


def unlearns(history: list[dict[str, Any]]) -> tuple[float, float, float, float] | None:
    """
    Whether the mean loss over all items has risen since p was higher.

    Args:
        history (`list[dict]`): `TrainerState.log_history`.

    Returns:
        `tuple[float, float, float, float]` or `None`: The lowest `full_loss` and p there, then the last ones, if it
            has risen by more than 5 % and more than chance; each is an average over a quarter of the logs.
    """
    logs = [log for log in history if "full_loss" in log and "keep_fraction" in log]  # which lacks without an item
    if len(logs) < 5:
        return None
    losses = [log["full_loss"] for log in logs]
    size, chance = _windows(losses)

    # The history is read at each log, so each window must cost the same, however long it is.
    sums = {
        name: list(accumulate((log[name] for log in logs), initial=0.0)) for name in ("full_loss", "keep_fraction")
    }

    def mean(name: str, end: int) -> float:
        return (sums[name][end] - sums[name][end - size]) / size

    best = min(range(size, len(logs) + 1), key=lambda end: mean("full_loss", end))
    lowest, last = mean("full_loss", best), mean("full_loss", len(logs))
    fractions = mean("keep_fraction", best), mean("keep_fraction", len(logs))
    has_risen = last - lowest > 0.05 * abs(lowest) + chance and fractions[1] < fractions[0] - 0.05
    return (lowest, fractions[0], last, fractions[1]) if has_risen else None


def evaluates_worse(
    history: list[dict[str, Any]], name: str, greater_is_better: bool
) -> tuple[float, float, float, float] | None:
    """
    Whether an evaluation is well below the best one, which was made when p was higher.

    Args:
        history (`list[dict]`): `TrainerState.log_history`.
        name (`str`): The metric that is looked at, such as `"eval_loss"`.
        greater_is_better (`bool`): Whether higher values are better.

    Returns:
        `tuple[float, float, float, float]` or `None`: The best value and p there, then the last ones, if the last is
            worse by more than a tenth (and by 0.1, if it is `"eval_loss"`).
    """
    points: list[tuple[float, float]] = []
    fraction = 1.0
    for log in history:
        fraction = log.get("keep_fraction", fraction)
        if isinstance(log.get(name), (int, float)):
            points.append((log[name], fraction))
    if len(points) < 2:
        return None
    sign = 1 if greater_is_better else -1
    best, last = max(points, key=lambda point: sign * point[0]), points[-1]
    margin = max(0.1 * abs(best[0]), 0.1 if name == "eval_loss" else 0.0)
    is_worse = sign * (best[0] - last[0]) > margin and last[1] < best[1] - 0.05
    return (*best, *last) if is_worse else None
