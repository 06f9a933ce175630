"""
Statistics of a comparison: mean over the seeds, and paired differences from plain training.

Records of runs (one per arm and seed) → one [`Summary`] per arm.
"""

import statistics
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap

from hf_trim.run.records import ARMS, UNITS, metric_name, test_score


MIN_SEEDS = 5  # with fewer, a bootstrap interval is not more than the range of the differences
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


class Summary(NamedTuple):
    """
    One arm of a comparison.

    Args:
        arm (`str`): One of `ARMS`.
        runs (`int`): Number of runs.
        metric (`str`): `"error"` or `"perplexity"`.
        mean (`float`): Its mean on the test split; of the error, in percent.
        sd (`float` or `None`): Its standard deviation over the seeds; `None` for a single run.
        difference (`float` or `None`): Mean of the paired differences from the plain arm, seed by seed, in percentage
            points for errors; `None` for the plain arm.
        pairs (`int`): Number of seeds that have a plain run as well.
        interval (`tuple[float, float]` or `None`): 95 % bootstrap interval of that mean; needs `MIN_SEEDS` pairs.
        span (`tuple[float, float]` or `None`): Lowest and highest of the differences; needs two pairs.
        wins (`int` or `None`): Number of seeds with a lower value than the plain arm's.
        kept (`float` or `None`): The fraction p that was kept, on average over the training's logs.
        seconds (`float` or `None`): Mean seconds of training per run, without evaluation; `None` if a record has none
            (`null`: other work on the machine disturbed the clock).
        speedup (`float` or `None`): The plain arm's seconds over this arm's, on the seeds they share.
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
    difference: float | None
    pairs: int
    interval: tuple[float, float] | None
    span: tuple[float, float] | None
    wins: int | None
    kept: float | None
    seconds: float | None
    speedup: float | None
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
    return [_summarize_arm(arm, runs, runs_of["plain"]) for arm, runs in runs_of.items() if runs]


def _summarize_arm(arm: str, runs: dict[int, dict], plain: dict[int, dict]) -> Summary:
    """One arm's runs by seed, compared with the plain ones."""
    scores = [test_score(runs[seed]) for seed in sorted(runs)]
    # The seed fixes the first weights and the order of the data, so runs are compared seed by seed.
    shared = sorted(runs.keys() & plain.keys()) if arm != "plain" else []
    differences = [test_score(runs[seed]) - test_score(plain[seed]) for seed in shared]
    fractions = [log["keep_fraction"] for run in runs.values() for log in run["history"] if "keep_fraction" in log]
    seconds, speedup, speedups = None, None, []
    if all(run["train_seconds"] is not None for run in [*runs.values(), *plain.values()]):
        seconds = statistics.mean(run["train_seconds"] for run in runs.values())
        if shared:
            plain_seconds, arm_seconds = (
                sum(by_seed[seed]["train_seconds"] for seed in shared) for by_seed in (plain, runs)
            )
            speedup = plain_seconds / arm_seconds
            speedups = [plain[seed]["train_seconds"] / runs[seed]["train_seconds"] for seed in shared]
    return Summary(
        arm=arm,
        runs=len(runs),
        metric=metric_name(next(iter(runs.values()))),
        mean=statistics.mean(scores),
        sd=statistics.stdev(scores) if len(scores) > 1 else None,
        difference=statistics.mean(differences) if differences else None,
        pairs=len(shared),
        interval=paired_interval(differences) if len(shared) >= MIN_SEEDS else None,
        span=_span(differences),
        wins=sum(difference < 0 for difference in differences) if differences else None,
        kept=statistics.mean(fractions) if fractions else None,
        seconds=seconds,
        speedup=speedup,
        speedup_span=_span(speedups),
        macro_f1=_mean_of("test_macro_f1", runs),
        majority_error=_mean_of("majority_error", runs),
    )


def _span(values: list[float]) -> tuple[float, float] | None:
    return (min(values), max(values)) if len(values) > 1 else None


def _mean_of(field: str, runs: dict[int, dict]) -> float | None:
    """The mean of a field; `None` if a record lacks it, as older ones do."""
    values = [run[field] for run in runs.values() if field in run]
    return statistics.mean(values) if len(values) == len(runs) else None


def paired_interval(differences: list[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """
    Percentile bootstrap interval of a mean of paired differences. With few seeds it is too narrow rather than too
    wide; a test of significance could not tell anything with so few.

    Args:
        differences (`list[float]`): One difference per seed.
        confidence (`float`, *optional*, defaults to 0.95): Its level.

    Returns:
        `tuple[float, float]` or `None`: Lower and upper end; `None` for fewer than two differences.
    """
    if len(differences) < 2:
        return None
    # A fixed seed: the same records give the same table.
    interval = bootstrap(
        (differences,), np.mean, confidence_level=confidence, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(interval.low), float(interval.high)
