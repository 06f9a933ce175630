"""
Between the steps of: batch → per-item losses → keep decision → trimmed backward → logs.

What later steps depend on is part of `TrainerState`, among the state of its callbacks: it then is in each checkpoint,
a resumed training goes on with it, and a new one begins without it.
"""

from typing import Any, cast

from transformers import TrainerState


MASS, BACKWARD = "TrimmingMass", "TrimmingBackward"
NAMES = (MASS, BACKWARD)


def kept_state(state: TrainerState, name: str) -> dict[str, Any]:
    """
    Args:
        state ([`~transformers.TrainerState`]): The trainer's state.
        name (`str`): One of `NAMES`.

    Returns:
        `dict`: What is kept under that name, to be changed in place; empty at first.
    """
    callbacks = cast(dict[str, Any], state.stateful_callbacks)
    return callbacks.setdefault(name, {"args": {}, "attributes": {}})["attributes"]
