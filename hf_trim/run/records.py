"""Records: one JSON file for each finished run of a comparison."""

import hashlib
import json
from pathlib import Path

import torch

from hf_trim.environment import hardware, versions
from hf_trim.run.clock import train_seconds


# The arms of a comparison, in the order in which they are trained and shown.
ARMS = ("plain", "trimmed", "adaptive", "random", "random-adaptive", "adaptive-skip", "short")
DEFAULT_ARMS = ARMS[:4]  # those of a comparison without `--arms`
# The unit of each metric, as it stands after a value.
UNITS = {"error": " %", "perplexity": ""}
BACKWARD_COST = 2  # of a backward pass, in forward passes


def make_record(
    recipe: str, arm: str, seed: int, settings: dict, metrics: dict, log_history: list[dict], classes: dict
) -> dict:
    """
    Make the record of a finished run.

    Args:
        recipe (`str`): The recipe's name.
        arm (`str`): One of `ARMS`.
        seed (`int`): Seed of weights, data order and random control.
        settings (`dict`): Values of all arguments that were set.
        metrics (`dict`): Metrics on the test split after training: `eval_loss`, and `eval_error` in percent or
            `eval_perplexity`.
        log_history (`list[dict]`): `TrainerState.log_history`.
        classes (`dict`): What [`~hf_trim.run.metrics.describe_classes`] returned.

    Returns:
        `dict`: The record.
    """
    metric = "error" if "eval_error" in metrics else "perplexity"
    # With a validation split, the tests during the training are of that split.
    split = "validation" if any(f"test_{metric}" in log for log in log_history) else "test"
    history: dict[int, dict] = {}
    scores: dict[str, float] = {}
    seconds = 0.0
    for log in log_history:
        names = {
            f"eval_{metric}": f"{split}_{metric}", "eval_loss": f"{split}_loss", f"test_{metric}": f"test_{metric}",
            "test_loss": "test_loss", "loss": "loss", "full_loss": "full_loss", "keep_fraction": "keep_fraction",
            "kept_fraction": "kept_fraction",
        }  # fmt: skip
        values = {name_in_record: log[name] for name, name_in_record in names.items() if name in log}
        if "train_seconds" in log:
            seconds += log["train_seconds"]
            values["train_seconds"] = seconds
        if values:
            history.setdefault(log["step"], {"epoch": log["epoch"]}).update(values)
    if classes:
        scores = {"majority_error": classes["majority_error"]}
        scores |= {"test_macro_f1": metrics["eval_macro_f1"]} if classes["is_unbalanced"] else {}
    return {
        "recipe": recipe,
        "arm": arm,
        "seed": seed,
        "metric": metric,
        f"test_{metric}": metrics[f"eval_{metric}"],
        "test_loss": metrics["eval_loss"],
        **scores,
        **{name: metrics[name] for name in (f"validation_{metric}", "validation_loss") if name in metrics},
        "train_seconds": train_seconds(log_history),
        "history": [history[step] for step in sorted(history)],
        "settings": settings,
        "versions": versions(),
        "hardware": used_hardware(),
    }


def used_hardware() -> str:
    """
    Returns:
        `str`: The hardware of this machine, on CPUs with the number of threads if it is not that of the cores, e.g.
            `"2 CPU cores, 1 thread"`.
    """
    name, threads = hardware(), torch.get_num_threads()
    if torch.cuda.is_available() or name == f"{threads} CPU cores":
        return name
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def metric_name(record: dict) -> str:
    """
    Name the metric of a record.

    Args:
        record (`dict`): A record.

    Returns:
        `str`: `"error"` (in percent) or `"perplexity"`.
    """
    return record.get("metric", "error")  # the oldest records have no such field


def test_score(record: dict) -> float:
    """
    Read the score of a record.

    Args:
        record (`dict`): A record.

    Returns:
        `float`: Its metric on the test split after training.
    """
    return record[f"test_{metric_name(record)}"]


def cost_of(record: dict) -> float | None:
    """
    Args:
        record (`dict`): A record.

    Returns:
        `float` or `None`: Its cost in forward passes of a sample; `None` if the record does not say it.
    """
    if "forward_passes" not in record:
        return None
    return record["forward_passes"] + BACKWARD_COST * record["backward_passes"]


def fingerprint(settings: dict) -> str:
    """
    Hash the settings of a run.

    Args:
        settings (`dict`): Values of all arguments that were set.

    Returns:
        `str`: A short hash, which is the same for equal settings.
    """
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def read_records(path: Path) -> list[dict]:
    """
    Read a file of records.

    Args:
        path (`Path`): A file with a record or a list of records.

    Returns:
        `list[dict]`: The records; none if there is no file.

    Raises:
        `ValueError`: If the file holds anything else, or an arm that there is not.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        records = content if isinstance(content, list) else [content]
        for record in records:
            # Only looked up: a missing field raises, and the file is then no record.
            record["seed"], test_score(record), record["train_seconds"], record["history"]
            if record["arm"] not in ARMS:
                raise ValueError(f"{path} has a run of an arm '{record['arm']}': there are {', '.join(ARMS)}.")
    except FileNotFoundError:
        return []
    except KeyError as error:
        raise ValueError(f"{path} is no record of a finished run: it has no {error}.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no record of a finished run, but broken, or no JSON: {error}.") from None
    except (TypeError, AttributeError):
        raise ValueError(f"{path} is no record of a finished run: it holds something else.") from None
    return records


def read_record(path: Path) -> dict | None:
    """
    Read a file of one record.

    Args:
        path (`Path`): The file.

    Returns:
        `dict` or `None`: The record; `None` if there is no file.

    Raises:
        `ValueError`: If the file is not a record.
    """
    return next(iter(read_records(path)), None)
