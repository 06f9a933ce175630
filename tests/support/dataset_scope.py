"""
Trimming over the data set: `python -m tests.support.dataset_scope digits-vit bbc-minilm --output rows.json`.

In each epoch only a part of the data set is trained on, chosen by the losses that were remembered of each sample. The
rest is not even loaded, so that the forward pass is saved as well, and batch normalization is no obstacle. The
question is whether a rule beats plain training *of the same cost*: fewer steps with all samples, whose learning rate
falls to its end all the same. The cost is the number of samples that went forward and backward.

- `plain`: all samples in each epoch;
- `rank`: the fraction p with the highest losses; p falls from 1 to 0.2 by epoch;
- `random`: a random fraction p;
- `rank-last`: as `rank`, but p falls to 0.1, and the last fifth of the epochs is whole. Its cost is that of `rank`;
- `random-last`: random fractions as large as those of `rank-last`;
- `infobatch`: each sample below the mean loss is left out with probability r = 0.5, and the kept ones of these have
  the weight 1 / (1 - r); after 87.5 % of the epochs all are kept (Qin et al., arXiv 2303.04947);
- `mass`: the fewest samples with 95 % of the mass u = 1 - exp(-loss);
- `short`: plain training with the number of steps of `rank` (those with `-last` take as many, or a few more);
- `short-infobatch`, `short-mass`: with the number of steps that this rule took with this seed.

The first epoch is always whole. In `rank`, `rank-last` and `mass` a sample that was not seen in three epochs comes
back. In the first two these are a part of the fraction p, at most half of it: for p = 0.2 they would else be all of
it. Three epochs are too few for `rank-last` and `random-last`, which are left out there.

Of an epoch that is not whole the last mini-batch is left out where it is not full: one of a few samples would be noise
for batch normalization. The learning rate follows the steps where their number is known before, and the epochs with
`infobatch` and `mass`.

Options that are not known here are those of `hf-trim run`, such as `--label_noise 0.2`. The rows are written after
each run, and runs whose rows are there are not repeated, so `--seeds 5` goes on after `--seeds 3`.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hf_trim  # noqa: F401 (before transformers: it repairs torchvision where torch has no CUDA)


# isort: split
import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from hf_trim.files import write_json
from hf_trim.report.summary import MIN_SEEDS, paired_interval
from hf_trim.report.tables import markdown_table
from hf_trim.run.recipe import parse
from hf_trim.run.trainer import RecipeTrainer, load_job_data, make_trainer


# Recipes and their options; any other recipe is a task, too.
SMALL_CNN = {"channels": [16, 32, 64, 128], "stem_width": 8}  # 6 s an epoch on a core
TASKS: dict[str, tuple[str, list[str]]] = {
    "bbc-minilm": ("bbc-minilm", [
        "--num_train_epochs", "5", "--max_seq_length", "64", "--max_train_samples", "512", "--warmup_steps", "5",
    ]),
    "digits-resnet": ("digits-resnet", ["--num_train_epochs", "5"]),  # 15 leave no error that a rule could lower
    "fashion-cnn": ("fashion-mnist-resnet34", [
        "--timm_model", "resnet10t", "--config_overrides", json.dumps(SMALL_CNN), "--max_train_samples", "8000",
        "--num_train_epochs", "10",
    ]),
}  # fmt: skip
# Each arm with the plain one of the same cost, which comes after it.
PARTNERS = {
    "rank": "short", "random": "short", "rank-last": "short", "random-last": "short", "infobatch": "short-infobatch",
    "mass": "short-mass",
}  # fmt: skip
ARMS = (
    "plain", "rank", "short", "random", "rank-last", "random-last", "infobatch", "short-infobatch", "mass",
    "short-mass",
)  # fmt: skip
RULES = {"short": "rank", "short-infobatch": "infobatch", "short-mass": "mass"}  # whose steps these take
BY_EPOCH = ("infobatch", "mass")  # whose number of steps is not known before

P_END, COST = 0.2, 0.6  # p falls from 1 to this, which is this on average
P_FLOOR, LAST = 0.1, 0.2  # of `rank-last` and `random-last`: the lowest p, and the share of whole epochs at the end
REFRESH = 3  # epochs without a sample after which it comes back
DROPPED, PRUNED_UNTIL = 0.5, 0.875  # of `infobatch`: r, and the share of the epochs after which all are whole
MASS = 0.95


def fractions(arm: str, epochs: int) -> list[float]:
    """
    Args:
        arm (`str`): An arm whose fractions are known before the training.
        epochs (`int`): Number of epochs.

    Returns:
        `list[float]`: p of each epoch. Empty if there are too few epochs for the cost with whole ones at the end.
    """
    if arm in ("rank", "random"):
        return np.linspace(1, P_END, epochs).tolist()
    if arm not in ("rank-last", "random-last"):
        return [1.0] * epochs
    whole = round(LAST * epochs)
    wanted = COST * epochs - whole  # of the epochs before
    if wanted < 1 + P_FLOOR * (epochs - whole - 1):
        return []
    slow, steep = 0.0, 1.0
    for _ in range(60):  # by bisection: the sum falls with the slope
        slope = (slow + steep) / 2
        falling = [max(P_FLOOR, 1 - slope * epoch) for epoch in range(epochs - whole)]
        slow, steep = (slope, steep) if sum(falling) > wanted else (slow, slope)
    return falling + [1.0] * whole


def weights_of(
    arm: str, epoch: int, epochs: int, losses: np.ndarray, seen: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """
    Args:
        arm (`str`): The arm.
        epoch (`int`): The epoch, counted from 0.
        epochs (`int`): Number of epochs.
        losses (`np.ndarray`): `[n]`, the last loss of each sample.
        seen (`np.ndarray`): `[n]`, the epoch of that loss.
        rng (`np.random.Generator`): For what is drawn.

    Returns:
        `np.ndarray`: `[n]`, the weight of each sample in this epoch; 0 for those that are left out.
    """
    n = len(losses)
    if epoch == 0:
        return np.ones(n)
    if arm == "infobatch":
        if epoch >= PRUNED_UNTIL * epochs:
            return np.ones(n)
        is_dropped = rng.random(n) < DROPPED
        return np.where(losses >= losses.mean(), 1, np.where(is_dropped, 0, 1 / (1 - DROPPED)))
    weights = np.zeros(n)
    hardest = np.argsort(-losses, kind="stable")
    is_back = epoch - seen > REFRESH
    if arm == "mass":
        masses = 1 - np.exp(-losses[hardest])
        weights[hardest[: 1 + np.searchsorted(masses.cumsum(), MASS * masses.sum())]] = 1
        weights[is_back] = 1
        return weights
    k = max(1, round(fractions(arm, epochs)[epoch] * n))
    if arm in ("rank", "rank-last"):
        longest = hardest[np.argsort(seen[hardest], kind="stable")]  # unseen for longest first, of these the hardest
        weights[longest[is_back[longest]][: k // 2]] = 1
        hardest = hardest[weights[hardest] == 0]
        weights[hardest[: k - int(weights.sum())]] = 1
    else:  # `random`, or all
        weights[rng.permutation(n)[:k]] = 1
    return weights


def split(order: np.ndarray, size: int, is_whole: bool) -> list[list[int]]:
    """
    Args:
        order (`np.ndarray`): The samples of an epoch.
        size (`int`): The size of a mini-batch.
        is_whole (`bool`): Whether these are all samples.

    Returns:
        `list[list[int]]`: The mini-batches. All are full if it is not whole, unless the first is not.
    """
    batches = [order[start : start + size].tolist() for start in range(0, len(order), size)]
    return batches if is_whole or len(batches) == 1 or len(batches[-1]) == size else batches[:-1]


def train(trainer: RecipeTrainer, arm: str, seed: int, steps: int | None = None) -> list[int]:
    """
    Train as the recipe says, but in each epoch on the samples of an arm.

    Args:
        trainer ([`RecipeTrainer`]): Has the model, the data, the optimizer and the learning rate.
        arm (`str`): The arm.
        seed (`int`): Orders the samples as [`~transformers.Trainer`] does; an arm leaves some of them out.
        steps (`int`, *optional*): Stop after this number of steps, where the learning rate has its end.

    Returns:
        `list[int]`: The number of samples in each mini-batch.
    """
    args, model, loader = trainer.args, trainer.model, trainer.get_train_dataloader()
    n, size, epochs = len(loader.dataset), args.train_batch_size, int(args.num_train_epochs)
    if arm in BY_EPOCH:
        planned = epochs * math.ceil(n / size)
    else:
        planned = steps or sum(len(split(np.arange(round(p * n)), size, p == 1)) for p in fractions(arm, epochs))
    optimizer = trainer.create_optimizer()
    (factor, *_) = trainer.create_scheduler(planned, optimizer).lr_lambdas
    losses, seen, sizes = np.full(n, np.nan), np.zeros(n, np.int64), []
    model.train()
    for epoch in range(epochs):
        weights = weights_of(arm, epoch, epochs, losses, seen, np.random.default_rng((seed, epoch)))
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).numpy()
        batches = split(order[weights[order] > 0], size, is_whole=bool(weights.all()))
        loaded = DataLoader(loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn)
        for place, (indices, batch) in enumerate(zip(batches, loaded, strict=True)):
            if len(sizes) == steps:
                return sizes
            done = (epoch + place / len(batches)) / epochs * planned if arm in BY_EPOCH else len(sizes)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor(done)
            batch = {name: values.to(args.device) for name, values in batch.items()}
            each = cross_entropy(model(**batch).logits, batch["labels"], reduction="none")
            (each * torch.tensor(weights[indices], dtype=each.dtype, device=each.device)).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses[indices], seen[indices] = each.detach().cpu(), epoch
            sizes.append(len(indices))
    return sizes


def run(job: Any, data: Any, arm: str, seed: int, steps: int | None = None) -> dict[str, Any]:
    """
    Train and test an arm.

    Args:
        job ([`~hf_trim.run.recipe.Job`]): The recipe.
        data ([`~hf_trim.data.Data`]): Its data.
        arm (`str`): The arm.
        seed (`int`): The seed.
        steps (`int`, *optional*): The steps of a short arm.

    Returns:
        `dict`: The test error in percent, the number of steps, the cost beside plain training, and the samples of each
            step.
    """
    with TemporaryDirectory() as folder:
        trainer = make_trainer(
            job, data, {"trim_select": "none", "save_strategy": "no"}, seed, Path(folder), title=arm
        )
        sizes = train(trainer, arm, seed, steps)
        error = trainer.evaluate()["eval_error"]
    cost = sum(sizes) / (len(data.train_dataset) * int(trainer.args.num_train_epochs))
    return {"arm": arm, "seed": seed, "error": error, "steps": len(sizes), "cost": cost, "sizes": sizes}


def finish(task: str, seeds: int, arms: list[str], options: list[str], rows: list[dict], path: Path) -> None:
    """
    Train what is not trained yet of a task.

    Args:
        task (`str`): One of `TASKS`, or a recipe.
        seeds (`int`): Number of seeds.
        arms (`list[str]`): Which of `ARMS`; a short one only with its rule.
        options (`list[str]`): Further options of the recipe.
        rows (`list[dict]`): The rows so far; new ones are added.
        path (`Path`): The file of the rows.
    """
    recipe, own = TASKS.get(task, (task, []))
    job = parse(recipe, [*own, *options])
    data, of_task = None, {"task": Path(task).stem, "options": " ".join(options)}
    for seed in range(seeds):
        steps = {row["arm"]: row["steps"] for row in rows if {**row, **of_task, "seed": seed} == row}
        for arm in ARMS:
            if arm not in arms or arm in steps or not fractions(arm, int(job.training.num_train_epochs)):
                continue
            data = data or load_job_data(job)
            row = run(job, data, arm, seed, steps[RULES[arm]] if arm in RULES else None)
            steps[arm] = row["steps"]
            rows.append({**of_task, **row})
            write_json(path, rows)
            print(f"{task}, seed {seed}, {arm}: {row['error']:.2f} %, cost {row['cost']:.3f}", flush=True)


def differences(rows: list[dict], arm: str) -> list[float]:
    """
    Args:
        rows (`list[dict]`): The rows of a task.
        arm (`str`): A rule.

    Returns:
        `list[float]`: Its test error minus that of plain training of the same cost, seed by seed.
    """
    errors = {(row["arm"], row["seed"]): row["error"] for row in rows}
    pairs = [(error, errors.get((PARTNERS[arm], seed))) for (name, seed), error in errors.items() if name == arm]
    return [error - other for error, other in pairs if other is not None]


def report(rows: list[dict]) -> str:
    """
    Args:
        rows (`list[dict]`): The rows of all tasks.

    Returns:
        `str`: A table of the arms, and what follows for each rule. Round brackets are the interval of 95 %,
            below which chance lies; with fewer seeds than it needs, square ones are the range.
    """
    tasks: dict[str, list[dict]] = {}
    for row in rows:
        tasks.setdefault(f"{row['task']} {row['options']}".strip(), []).append(row)
    lines: list[list[str]] = []
    lower, beats, tried, sure = ({arm: 0 for arm in PARTNERS} for _ in range(4))
    for task, own in tasks.items():
        for arm in ARMS:
            found = [row for row in own if row["arm"] == arm]
            if not found:
                continue
            cost = statistics.mean(row["cost"] for row in found)
            cells = [task, arm, _mean([row["error"] for row in found]), f"{cost:.2f}"]
            apart = differences(own, arm) if arm in PARTNERS else []
            if apart:
                mean, low, high = statistics.mean(apart), min(apart), max(apart)
                cells.append(f"{mean:+.2f}" + (f" [{low:+.2f} … {high:+.2f}]" if len(apart) > 1 else ""))
                lower[arm] += mean < 0
                tried[arm] += 1
                if len(apart) >= MIN_SEEDS:
                    low, high = paired_interval(apart)
                    cells[-1] = f"{mean:+.2f} ({low:+.2f} … {high:+.2f})"
                    beats[arm] += high < 0
                    sure[arm] += 1
                cells.append(f"{sum(x < 0 for x in apart)} : {sum(x > 0 for x in apart)}")
            lines.append(cells + ["–"] * (6 - len(cells)))
    head = ["task", "arm", "test error in %", "cost", "beside plain of this cost", "seeds better : worse"]
    verdicts = [
        f"{arm}: lower error than {PARTNERS[arm]} on {lower[arm]} of {count} tasks, beyond chance on {beats[arm]} of "
        f"the {sure[arm]} with {MIN_SEEDS} seeds."
        for arm, count in tried.items()
        if count
    ]
    return "\n".join([markdown_table(head, lines), *verdicts])


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, and print the table of all rows in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"{', '.join(TASKS)}, or a recipe.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True, help="A JSON file of the rows.")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="By default all.")
    asked, options = parser.parse_known_args(arguments)
    for arm in asked.arms:
        if arm in RULES and RULES[arm] not in asked.arms:
            parser.error(f"--arms {arm} takes the steps of {RULES[arm]}: add that.")
    rows = json.loads(asked.output.read_text(encoding="utf-8")) if asked.output.is_file() else []
    for task in asked.tasks:
        finish(task, asked.seeds, asked.arms, options, rows, asked.output)
    print(report(rows))


if __name__ == "__main__":
    main()
