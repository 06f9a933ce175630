"""
The summary of a training, as today's are: one that an earlier version wrote has fewer fields.

For example, `{"model_name": "tiny"}` → `{"model_name": "tiny", "channels": 3, ...}`.
"""

import json
from pathlib import Path
from typing import Any

from hf_trim.trainer.arguments import TrimmingConfig


# Fields of `run.json` that have come later, or may be empty.
SUMMARY: dict[str, Any] = {
    "model_class": "model", "architecture": None, "channels": 3, "library": "transformers", "language": None,
    "license": None, "tags": [], "base_model": None, "task": None, "datasets": [], "dataset_names": [],
    "dataset_config": None, "split": "the test split", "metrics": {}, "majority_error": None, "best_step": None,
    "arm": "trimmed", "history": [], "hyperparameters": {}, "train_seconds": None, "includes_evaluation": False,
    "seed": 42, "hardware": "a machine that was not noted", "versions": {}, "command": None, "recipe": None,
}  # fmt: skip


def read_summary(path: Path) -> dict[str, Any]:
    """
    Read the summary of a training.

    Args:
        path (`Path`): The file `run.json` of an output folder.

    Returns:
        `dict`: All fields that [`~hf_trim.hub.model_card.render_card`] takes.

    Raises:
        `ValueError`: If the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is broken, or no JSON: {error}. Move the file to another place.") from None
    summary = SUMMARY | {"model_name": path.absolute().parent.name} | content
    names = ("trim_keep_start", "trim_keep_end", "trim_schedule", "trim_mass", "trim_select", "trim_skip_hardest",
             "trim_scope")  # fmt: skip
    trim = {name: getattr(TrimmingConfig, name) for name in names} | summary.get("trim", {})
    config = TrimmingConfig(**trim)
    base, epochs = summary["base_model"], summary.get("epochs")
    missing = {
        "origin": f"fine-tuned from `{base}`" if base else "",
        "trims": config.trims or config.trims_dataset,
        "schedule_unit": trim["trim_schedule"],
        # How many steps were planned, was not noted.
        **dict.fromkeys(("planned", "done"), epochs if trim["trim_schedule"] == "epoch" else None),
    }
    return missing | summary | {"trim": trim}
