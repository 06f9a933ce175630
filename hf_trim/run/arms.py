"""
The arms of a comparison: what each one changes in the recipe.

e.g. `short` with seed 3, on 1,000 samples: the adaptive training of seed 3 had 20,000 forward and 11,000 backward
passes. That is the cost of 14 epochs of plain training, (20,000 + 2 · 11,000) / (3 · 1,000), and so many it gets,
rounded down to whole steps.
"""

import dataclasses
import math
from collections.abc import Sized
from typing import Any, NamedTuple, cast

from transformers import TrainingArguments

from hf_trim.data import Data
from hf_trim.run.recipe import Job, RecipeError
from hf_trim.run.records import ARMS, BACKWARD_COST, cost_of
from hf_trim.trainer.arguments import TrimmingConfig


# The arguments of each arm that differ from the recipe's.
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {"trim_select": "none"},
    "trimmed": {"trim_select": "hardest"},
    "adaptive": {
        "trim_select": "hardest", "trim_schedule": "adaptive", "trim_keep_start": TrimmingConfig.trim_keep_start,
        "trim_keep_end": TrimmingConfig.trim_keep_end,
    },
    "random": {"trim_select": "random"},
}  # fmt: skip
CHANGES["random-adaptive"] = {**CHANGES["adaptive"], "trim_select": "random"}
CHANGES["adaptive-skip"] = CHANGES["adaptive"]
CHANGES["short"] = CHANGES["plain"]
STEPS = ("num_stable_steps", "num_decay_steps", "timescale")  # in `lr_scheduler_kwargs`: these are numbers of steps


class Arm(NamedTuple):
    """
    An arm of one recipe and seed.

    Args:
        name (`str`): One of `ARMS`.
        job ([`Job`]): The recipe, with fewer epochs for `short`.
        changes (`dict`): Training arguments that differ from it.
        same_as (`str`, *optional*): Another arm of this seed that is the same training.
        cost_of (`str`, *optional*): The arm whose cost it has, of `short`.
    """

    name: str
    job: Job
    changes: dict[str, Any]
    same_as: str | None = None
    cost_of: str | None = None


def arms_of(job: Job) -> list[str]:
    """
    The arms that a comparison trains.

    Args:
        job ([`Job`]): The recipe. If p follows the losses in it anyway, there are no other adaptive arms.

    Returns:
        `list[str]`: Names of arms, plain first.
    """
    return [arm for arm in ARMS if arm in job.run.arms and not ("adaptive" in arm and job.training.is_adaptive)]


def cost_arm(job: Job) -> str:
    """
    The arm whose cost `short` has.

    Args:
        job ([`Job`]): The recipe.

    Returns:
        `str`: `"adaptive"` if it is trained, else `"trimmed"`.
    """
    return "adaptive" if "adaptive" in arms_of(job) else "trimmed"


def check_cost(job: Job, seed: int, record: dict | None, cost_record: dict | None) -> None:
    """
    Refuse to go on with a comparison whose `short` has the cost of another arm than it would have now, or would have
    one that nobody knows.

    Args:
        job ([`Job`]): The recipe.
        seed (`int`): The seed.
        record (`dict`, *optional*): The record of `short` that is there.
        cost_record (`dict`, *optional*): That of the arm whose cost it has, see [`cost_arm`].

    Raises:
        [`RecipeError`]: If that is so.
    """
    if record is None and cost_record is not None and cost_of(cost_record) is None:
        raise RecipeError(
            f"the record of {cost_record['arm']}, seed {seed}, was written by an earlier version and does not say "
            "what that training cost, which the arm short needs: move it away, and it is trained again."
        )
    if record is not None and record.get("cost_of", cost_arm(job)) != cost_arm(job):
        raise RecipeError(
            f"the arm short, seed {seed}, was trained at the cost of {record['cost_of']}, and would now have that of "
            f"{cost_arm(job)}: choose another --output_dir, or --arms as they were, or move the records of short away."
        )


def needed_arms(job: Job, name: str) -> tuple[str, ...]:
    """
    Args:
        job ([`Job`]): The recipe.
        name (`str`): One of `ARMS`.

    Returns:
        `tuple[str, ...]`: The arms that must be finished before it is trained, with the same seed.
    """
    return ("plain", cost_arm(job)) if name == "short" else ()


def make_arm(job: Job, name: str, seed: int, data: Data | None = None, cost_record: dict | None = None) -> Arm:
    """
    Args:
        job ([`Job`]): The recipe.
        name (`str`): One of `ARMS`.
        seed (`int`): The seed.
        data ([`Data`], *optional*): The recipe's data, for `short`.
        cost_record (`dict`, *optional*): For `short`: the record of the arm whose cost it has, see [`cost_arm`].

    Returns:
        [`Arm`]: The arm.
    """
    changes = {**CHANGES[name], "run_name": f"{job.training.run_name or job.name}-{name}-seed{seed}"}
    if "adaptive" in name and job.training.trim_scope == "dataset":
        # In each mini-batch, where nothing has to come back.
        changes |= {"trim_scope": "local", "trim_refresh": TrimmingConfig.trim_refresh}
    if name == "adaptive-skip":
        changes["trim_skip_hardest"] = job.data.label_noise
    if name != "short":
        return Arm(name, job, changes)
    cost = cast(int, cost_of(cast(dict, cost_record)))  # `check_cost` has seen to it that it is there
    num_samples = len(cast(Sized, cast(Data, data).train_dataset))
    steps, all_steps, per_epoch = _affordable_steps(job.training, num_samples, cost)
    if steps == all_steps:
        return Arm(name, job, changes, same_as="plain", cost_of=cost_arm(job))
    share = steps / all_steps
    # `Trainer` takes whole steps, rounded up: 25 / 11 · 11 is above 25.
    changes["num_train_epochs"] = math.nextafter(steps / per_epoch, 0)
    if job.training.warmup_steps >= 1:  # below it is a share of all steps anyway
        changes["warmup_steps"] = round(share * job.training.warmup_steps)
    schedule = cast(dict, job.training.lr_scheduler_kwargs or {})
    if shorter := {name: round(share * schedule[name]) for name in STEPS if schedule.get(name)}:
        changes["lr_scheduler_kwargs"] = {**schedule, **shorter}
    if job.run.lr_milestones is not None:
        milestones = [share * epoch for epoch in job.run.lr_milestones]
        job = job._replace(run=dataclasses.replace(job.run, lr_milestones=milestones))
    return Arm(name, job, changes, cost_of=cost_arm(job))


def _affordable_steps(args: TrainingArguments, num_samples: int, cost: int) -> tuple[int, int, int]:
    """
    How many steps of plain training a cost allows, at least one; how many it has, and how many an epoch.

    e.g. 1,000 samples, 16 steps an epoch, a cost of 2,905: that of 968 samples, and 15 steps are counted as 938.
    """
    batch_size = args.train_batch_size * args.world_size
    batches = num_samples // batch_size if args.dataloader_drop_last else math.ceil(num_samples / batch_size)
    per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    all_steps = math.ceil(args.num_train_epochs * per_epoch)

    def count(steps: int) -> int:  # as in the records
        epochs, rest = divmod(steps, per_epoch)
        return round((epochs + rest * args.gradient_accumulation_steps / batches) * num_samples)

    affordable = [steps for steps in range(1, all_steps + 1) if (1 + BACKWARD_COST) * count(steps) <= cost]
    return max(affordable, default=1), all_steps, per_epoch
