"""
Step 3 (keep decision) of: batch → per-item losses → keep decision → trimmed backward → logs.

The fraction p of items to keep, from the progress of training. These are pure functions of the trainer's state, so
that a resumed training has the same p. For example, 5 epochs from 1.0 to 0.2: p = 1.0, 0.8, 0.6, 0.4, 0.2.
"""

import math


def linear_fraction(index: int, total: int, start: float, end: float) -> float:
    """
    The fraction p of items to keep in an epoch, falling linearly: p(e) = start + (end − start)·e/(E − 1)
    (arXiv 2110.13058, section 2). For a training loop of your own:

    ```python
    for epoch in range(num_epochs):
        keep = linear_fraction(epoch, num_epochs, start=1.0, end=0.2)
        for images, labels in loader:
            losses = torch.nn.functional.cross_entropy(model(images), labels, reduction="none")
            trimmed_mean(losses, keep, backward="sparse").backward()
            optimizer.step()
            optimizer.zero_grad()
    ```

    Args:
        index (`int`): Number e of the epoch (or step), from 0; numbers past the last one give `end`.
        total (`int`): Number E of epochs (or steps).
        start (`float`): Fraction in the first epoch (or step).
        end (`float`): Fraction in the last epoch (or step).

    Returns:
        `float`: The fraction of items to keep; `start` if there is one epoch only.
    """
    if total <= 1:
        return start
    if index >= total - 1:
        return end  # 1.0 + (0.3 - 1.0) is more than 0.3, and would keep 5 of 15 items
    return start + (end - start) * index / (total - 1)


def schedule_unit(trim_schedule: str, num_train_epochs: float, max_steps: int) -> str:
    """
    Whether p falls by epoch or by optimizer step. With a single epoch, or a number of steps, it falls by step.

    Args:
        trim_schedule (`str`): The unit that was asked for, `"epoch"` or `"step"`.
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
    The fraction p of the next batch that shall be kept.

    Args:
        start (`float`): p in the first epoch (or step).
        end (`float`): p in the last epoch (or step).
        unit (`str`): `"epoch"` or `"step"`, see [`schedule_unit`].
        epoch (`float`): Epochs done so far (`TrainerState.epoch`); p is constant within an epoch.
        num_epochs (`float`): Number of epochs; an incomplete last epoch counts as one.
        step (`int`): Optimizer steps done so far (`TrainerState.global_step`).
        num_steps (`int`): Number of optimizer steps (`TrainerState.max_steps`).

    Returns:
        `float`: The fraction of items to keep.
    """
    if unit == "epoch":
        return linear_fraction(math.floor(epoch), math.ceil(num_epochs), start, end)
    return linear_fraction(step, num_steps, start, end)
