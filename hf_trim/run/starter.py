"""Runs without a recipe: the values that such a run has, and a recipe as YAML."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from hf_trim.data.names import TABLE_SUFFIXES
from hf_trim.messages import plain


# What a run without a recipe sets; all else has the defaults of its arguments.
TRAINING: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 5e-5,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_strategy": "epoch",
}
FROM_SCRATCH: dict[str, Any] = {"num_train_epochs": 30, "learning_rate": 1e-3}


def starter_fields(asked: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """
    Make up for a recipe.

    Args:
        asked (`dict`): The fields that the command line sets, `dataset` and a model among them.

    Returns:
        `tuple[str, dict]`: A name for the run, made of data and model; and the values of the other fields.
    """
    pretrained = asked.get("model_name_or_path")
    model = pretrained or asked.get("timm_model") or asked.get("model_type") or "model"
    return "-".join(map(_short_name, (asked["dataset"], model))), {
        **TRAINING,
        **({} if pretrained else FROM_SCRATCH),
    }


def _short_name(name: str) -> str:
    path = Path(name)
    name = path.stem if path.suffix in TABLE_SUFFIXES else path.resolve().name if name.startswith(".") else path.name
    return re.sub(r"[^\w.-]+", "-", name)


def as_yaml(groups: dict[str, dict[str, Any]], comments: dict[str, str] | None = None, width: int = 119) -> str:
    """
    Write a recipe.

    Args:
        groups (`dict[str, dict]`): Group → fields and values; the fields of the group `""` stand outside of groups.
        comments (`dict[str, str]`, *optional*): Field → what stands behind its value.
        width (`int`, *optional*, defaults to 119): The longest line; a comment that would be longer is cut.

    Returns:
        `str`: The YAML.
    """
    lines: list[str] = []
    for group, fields in groups.items():
        if not fields:
            continue
        indent = "  " if group else ""
        if group:
            lines += [""] * bool(lines) + [f"{group}:"]
        for name, value in fields.items():
            line = f"{indent}{name}:" if isinstance(value, dict) else f"{indent}{name}: {_as_value(value)}"
            comment = (comments or {}).get(name)
            if comment and len(line) + 10 < width:
                line = f"{line}  # {comment}"
                line = line if len(line) <= width else f"{line[: width - 1]}…"
            lines.append(line)
            if isinstance(value, dict):
                lines += [f"{indent}  {key}: {_as_value(item)}" for key, item in value.items()]
    return "\n".join(lines) + "\n"


def _as_value(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return plain(value)
    if isinstance(value, float) and 0 < value < 1e-3:
        return f"{value:.8f}".rstrip("0")  # YAML 1.1 takes 5e-05 for a string
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value)
    return yaml.safe_dump(value, width=10**6, allow_unicode=True).removesuffix("\n").removesuffix("\n...")
