"""
Files that earlier versions wrote, as today's have them: names that have changed, and fields that are missing.

For example, `{"trim_start": 1.0}` → `{"trim_keep_start": 1.0}`.
"""

import json
from pathlib import Path
from typing import Any


# The words of the first versions → today's.
RENAMED = {"trim_start": "trim_keep_start", "trim_end": "trim_keep_end", "trim_fraction": "keep_fraction"}
# Fields of `run.json` that have come later, or may be empty.
SUMMARY: dict[str, Any] = {
    "model_class": "model", "architecture": None, "channels": 3, "library": "transformers", "language": None,
    "license": None, "tags": [], "base_model": None, "task": None, "datasets": [], "dataset_names": [],
    "dataset_config": None, "split": "the test split", "metrics": {}, "majority_error": None, "best_step": None,
    "arm": "trimmed", "history": [], "hyperparameters": {}, "train_seconds": None, "includes_evaluation": False,
    "seed": 42, "hardware": "a machine that was not noted", "versions": {}, "command": None, "recipe": None,
}  # fmt: skip


def read_json(path: Path) -> Any:
    """
    Read a file that any version of hf_trim may have written.

    Args:
        path (`Path`): The file.

    Returns:
        `Any`: Its content, with today's names.
    """
    return _rename(json.loads(path.read_text(encoding="utf-8")))


def read_summary(path: Path) -> dict[str, Any]:
    """
    Read the summary of a training.

    Args:
        path (`Path`): The file `run.json` of an output folder.

    Returns:
        `dict`: All fields that [`~hf_trim.hub.model_card.render_card`] takes.
    """
    from hf_trim.trainer.arguments import (
        TrimmingConfig,
    )  # here: its room imports this one

    summary = SUMMARY | {"model_name": path.absolute().parent.name} | read_json(path)
    names = ("trim_keep_start", "trim_keep_end", "trim_schedule", "trim_mass", "trim_select", "trim_skip_hardest")
    trim = {name: getattr(TrimmingConfig, name) for name in names} | summary.get("trim", {})
    base, epochs = summary["base_model"], summary.get("epochs")
    missing = {
        "origin": f"fine-tuned from `{base}`" if base else "",
        "trims": TrimmingConfig(**trim).trims,
        "schedule_unit": trim["trim_schedule"],
        # How many steps were planned, was not noted.
        **dict.fromkeys(("planned", "done"), epochs if trim["trim_schedule"] == "epoch" else None),
    }
    return missing | summary | {"trim": trim}


def _rename(content: Any) -> Any:
    if isinstance(content, dict):
        return {RENAMED.get(name, name): _rename(value) for name, value in content.items()}
    return [_rename(item) for item in content] if isinstance(content, list) else content
