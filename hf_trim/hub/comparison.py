"""The part of a model card about a comparison: its table, what it shows, and all seeds."""

from pathlib import Path

from hf_trim.messages import signed
from hf_trim.run.records import UNITS, metric_name, test_score


def describe_comparison(folder: Path | None, seed: int, arm: str) -> dict:
    """
    Args:
        folder (`Path`, *optional*): The output folder.
        seed (`int`): The seed of the model in it.
        arm (`str`): Its arm.

    Returns:
        `dict`: Values for the template of the model card; empty if the folder has no records.
    """
    if folder is None or not list(folder.glob("records/*.json")):
        return {}
    # Only here: the report needs matplotlib and rich, and a trainer without a comparison does not.
    from hf_trim.report import ARMS, find_records, markdown_table, notes, summarize, table_rows

    records = find_records([str(folder)])
    metric = metric_name(records[0])
    scores = {(record["seed"], record["arm"]): f"{test_score(record):.2f}" for record in records}
    seeds = sorted({seed for seed, _ in scores})
    arms = [arm for arm in ARMS if any(arm == trained for _, trained in scores)]
    rows = [[str(seed), *(scores.get((seed, arm), "–") for arm in arms)] for seed in seeds]
    summaries = {s.arm: s for s in summarize(records)}
    judged, control = ("adaptive", "random-adaptive") if "adaptive" in arm else ("trimmed", "random")
    verdict = describe_result(summaries.get(judged), summaries.get(control))
    model = f"This model is that of the arm *{arm}* with seed {seed}." if (seed, arm) in scores else ""
    return {
        "comparison": markdown_table(*table_rows(records)),
        "comparison_notes": notes(records),
        "seeds": markdown_table(["seed", *arms], rows),
        "metric": f"test {metric}{UNITS[metric]}",
        "verdict": " ".join(sentence for sentence in (model, verdict) if sentence),
    }


def describe_result(trimmed, random) -> str:
    """
    Args:
        trimmed ([`~hf_trim.report.summary.Summary`], *optional*): The trimmed arm.
        random ([`~hf_trim.report.summary.Summary`], *optional*): The arm with random subsets of the same size.

    Returns:
        `str`: What the differences from the plain arm show; empty if there are none.
    """
    if trimmed is None or trimmed.to_plain is None:
        return ""
    difference = trimmed.to_plain
    metric, change = f"the test {trimmed.metric}", signed(difference.mean)
    if difference.interval is None:
        seeds = "One seed tells" if difference.pairs == 1 else f"{difference.pairs} seeds tell"
        sentence = f"{seeds} nothing certain about whether trimming helps: it changed {metric} by {change}"
    else:
        low, high = difference.interval
        interval = f"{change} on average (95 % interval {signed(low)} … {signed(high)})"
        sentence = (
            f"Trimming lowered {metric} here: by {interval}"
            if high < 0
            else f"Trimming raised {metric} here, and did harm: by {interval}"
            if low > 0
            else f"Trimming changed {metric} by no more than chance may: by {interval}"
        )
    if random is None or random.to_plain is None:
        return f"{sentence}."
    return f"{sentence}. A random subset of the same size changed it by {signed(random.to_plain.mean)}."
