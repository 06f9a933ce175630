"""Training progress → p, the fraction of items that is kept. Pure functions, so that resuming gives the same p."""

import math


def linear_fraction(index: int, total: int, start: float, end: float) -> float:
    """
    The fraction at position `index` of `total`, falling linearly: p(e) = start + (end − start)·e/(E − 1)
    (arXiv 2110.13058, section 2).

    Args:
        index (`int`): Position, from 0; positions past the last one give `end`.
        total (`int`): Number of positions.
        start (`float`): Fraction at position 0.
        end (`float`): Fraction at position `total - 1`.

    Returns:
        `float`: The fraction of items to keep.
    """
    if total <= 1:
        return start
    return start + (end - start) * min(index, total - 1) / (total - 1)


def schedule_unit(trim_schedule: str, num_train_epochs: float, max_steps: int) -> str:
    """
    The unit in which p really falls: `"epoch"` becomes `"step"` where there are no several epochs to fall over.

    Args:
        trim_schedule (`str`): What was asked for, `"epoch"` or `"step"`.
        num_train_epochs (`float`): `TrainingArguments.num_train_epochs`.
        max_steps (`int`): `TrainingArguments.max_steps`; positive when it overrides the number of epochs.

    Returns:
        `str`: `"epoch"` or `"step"`.
    """
    return "step" if max_steps > 0 or math.ceil(num_train_epochs) <= 1 else trim_schedule


def keep_fraction(
    start: float, end: float, unit: str, *, epoch: float, num_epochs: float, step: int, num_steps: int
) -> float:
    """
    p for the next batch, a function of the trainer's state alone.

    Args:
        start (`float`): p in the first epoch (or step).
        end (`float`): p in the last one.
        unit (`str`): `"epoch"` or `"step"`, see [`schedule_unit`].
        epoch (`float`): Epochs done so far (`TrainerState.epoch`); its whole part counts.
        num_epochs (`float`): Number of epochs; a last part of an epoch counts as one.
        step (`int`): Optimizer steps done so far (`TrainerState.global_step`).
        num_steps (`int`): Number of optimizer steps (`TrainerState.max_steps`).

    Returns:
        `float`: The fraction of items to keep.
    """
    if unit == "epoch":
        return linear_fraction(math.floor(epoch), math.ceil(num_epochs), start, end)
    return linear_fraction(step, num_steps, start, end)
