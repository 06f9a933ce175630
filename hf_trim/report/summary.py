"""
Statistics of a comparison: mean over the seeds, and paired differences from plain training.

Records of runs (one per arm and seed) → one [`Summary`] per arm.
"""

import math
import statistics
from typing import NamedTuple

from scipy.stats import t

from hf_trim.run.records import ARMS, UNITS, cost_of, metric_name, test_score


MIN_SEEDS = 5  # with fewer, an interval is so wide that it says nothing
TITLES = {metric: f"test {metric}{unit}" for metric, unit in UNITS.items()}
# Test error in percent without and with trimming, mean of 10 runs (arXiv 2110.13058, Table 1).
PAPER = {
    "svhn-resnet34": (5.87, 5.76),
    "svhn-densenet121": (4.62, 4.42),
    "cifar10-resnet34": (17.43, 17.01),
    "cifar10-densenet121": (10.10, 10.19),
    "cifar100-resnet34": (48.19, 47.72),
    "cifar100-densenet121": (32.95, 32.18),
}


class Difference(NamedTuple):
    """
    How an arm differs from another one, seed by seed.

    Args:
        mean (`float`): Mean of the paired differences of the metric, in percentage points for errors.
        pairs (`int`): Number of seeds that both arms have.
        interval (`tuple[float, float]` or `None`): 95 % interval (Student's) of that mean; needs `MIN_SEEDS` pairs.
        span (`tuple[float, float]` or `None`): Lowest and highest of the differences; needs two pairs.
        wins (`int`): Number of seeds with a lower value than the other arm's.
    """

    mean: float
    pairs: int
    interval: tuple[float, float] | None
    span: tuple[float, float] | None
    wins: int

    @property
    def is_lower(self) -> bool:
        """Whether the metric is lower, and so better, beyond chance."""
        return self.interval is not None and self.interval[1] < 0

    @property
    def is_higher(self) -> bool:
        """Whether it is higher beyond chance."""
        return self.interval is not None and self.interval[0] > 0


class Summary(NamedTuple):
    """
    One arm of a comparison.

    Args:
        arm (`str`): One of `ARMS`.
        runs (`int`): Number of runs.
        metric (`str`): `"error"` or `"perplexity"`.
        mean (`float`): Its mean on the test split; of the error, in percent.
        sd (`float` or `None`): Its standard deviation over the seeds; `None` for a single run. With a run that ended
            in NaN or infinity, mean, deviation and differences are no numbers either.
        to_plain ([`Difference`] or `None`): The difference from the plain arm; `None` for the plain arm.
        to_short ([`Difference`] or `None`): The difference from shorter plain training.
        kept (`float` or `None`): The fraction that was kept, on average over the training's logs; older records only
            say what was asked for.
        cost (`float` or `None`): Forward and backward passes (a backward one counts twice) over those of plain
            training, mean of the seeds they share; `None` if the records do not have them.
        timed (`int`): Number of runs with a time: records have none (`null`) where other work disturbed the clock.
        seconds (`float` or `None`): Their mean seconds of training, without evaluation.
        speedup (`float` or `None`): The plain arm's seconds over this arm's, on the timed seeds they share.
        speedup_seeds (`int`): The number of these seeds.
        speedup_span (`tuple[float, float]` or `None`): Lowest and highest speed-up of a seed; needs two pairs.
        macro_f1 (`float` or `None`): Mean of the macro-F1, which records of unbalanced classes have.
        majority_error (`float` or `None`): Test error in percent of always the most frequent class; `None` if the
            records do not have it.
    """

    arm: str
    runs: int
    metric: str
    mean: float
    sd: float | None
    to_plain: Difference | None
    to_short: Difference | None
    kept: float | None
    cost: float | None
    timed: int
    seconds: float | None
    speedup: float | None
    speedup_seeds: int
    speedup_span: tuple[float, float] | None
    macro_f1: float | None
    majority_error: float | None


def summarize(records: list[dict]) -> list[Summary]:
    """
    Args:
        records (`list[dict]`): Records of finished runs, of one recipe with one setting.

    Returns:
        `list[Summary]`: One per arm that has runs, plain first.
    """
    runs_of = {arm: {record["seed"]: record for record in records if record["arm"] == arm} for arm in ARMS}
    return [_summarize_arm(arm, runs, runs_of) for arm, runs in runs_of.items() if runs]


def _summarize_arm(arm: str, runs: dict[int, dict], runs_of: dict[str, dict[int, dict]]) -> Summary:
    """One arm's runs by seed, compared with those of others."""
    plain = runs_of["plain"]
    scores = [test_score(runs[seed]) for seed in sorted(runs)]
    logs = [log for run in runs.values() for log in run["history"] if "keep_fraction" in log]
    fractions = [log.get("kept_fraction", log["keep_fraction"]) for log in logs]
    costs = {seed: (cost_of(runs[seed]), cost_of(plain[seed])) for seed in sorted(runs.keys() & plain.keys())}
    ratios = [own / others for own, others in costs.values() if own is not None and others is not None]
    seconds = {seed: run["train_seconds"] for seed, run in sorted(runs.items()) if run["train_seconds"] is not None}
    shared = [seed for seed in seconds if seed in plain and plain[seed]["train_seconds"] is not None]
    speedups = [plain[seed]["train_seconds"] / seconds[seed] for seed in shared] if arm != "plain" else []
    speedup = None
    if speedups:
        speedup = sum(plain[seed]["train_seconds"] for seed in shared) / sum(seconds[seed] for seed in shared)
    return Summary(
        arm=arm,
        runs=len(runs),
        metric=metric_name(next(iter(runs.values()))),
        mean=statistics.mean(scores),
        sd=_deviation(scores) if len(scores) > 1 else None,
        to_plain=_difference(runs, plain) if arm != "plain" else None,
        to_short=_difference(runs, runs_of["short"]) if arm != "short" else None,
        kept=statistics.mean(fractions) if fractions else None,
        cost=statistics.mean(ratios) if len(ratios) == len(costs) and ratios else None,
        timed=len(seconds),
        seconds=statistics.mean(seconds.values()) if seconds else None,
        speedup=speedup,
        speedup_seeds=len(speedups),
        speedup_span=_span(speedups),
        macro_f1=_mean_of("test_macro_f1", runs),
        majority_error=_mean_of("majority_error", runs),
    )


def _difference(runs: dict[int, dict], others: dict[int, dict]) -> Difference | None:
    # The seed fixes the first weights and the order of the data, so runs are compared seed by seed.
    differences = [test_score(runs[seed]) - test_score(others[seed]) for seed in sorted(runs.keys() & others.keys())]
    if not differences:
        return None
    return Difference(
        mean=statistics.mean(differences),
        pairs=len(differences),
        interval=paired_interval(differences) if len(differences) >= MIN_SEEDS else None,
        span=_span(differences),
        wins=sum(difference < 0 for difference in differences),
    )


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan  # `stdev` fails there


def _span(values: list[float]) -> tuple[float, float] | None:
    return (min(values), max(values)) if len(values) > 1 else None


def _mean_of(field: str, runs: dict[int, dict]) -> float | None:
    """The mean of a field; `None` if a record lacks it, as older ones do."""
    values = [run[field] for run in runs.values() if field in run]
    return statistics.mean(values) if len(values) == len(runs) else None


def paired_interval(differences: list[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """
    Student's interval of a mean of paired differences. (With 5 seeds the percentile bootstrap of 95 % would hold the
    true mean in 84 % of the cases only.)

    Args:
        differences (`list[float]`): One difference per seed.
        confidence (`float`, *optional*, defaults to 0.95): Its level.

    Returns:
        `tuple[float, float]` or `None`: Lower and upper end; `None` for fewer than two differences.
    """
    if len(differences) < 2:
        return None
    number, mean = len(differences), statistics.mean(differences)
    half = float(t.ppf((1 + confidence) / 2, number - 1)) * _deviation(differences) / math.sqrt(number)
    return mean - half, mean + half
