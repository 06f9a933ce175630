"""
How well a memory of losses finds wrong labels: `python -m tests.support.label_errors digits-vit bbc-minilm`.

Some training labels are made wrong (`--noise`), and a training remembers the losses of each sample. Samples are then
ranked, and it is counted how many of the first k have a wrong label, where k is the number of wrong labels (precision
at k), and the area under the precision–recall curve (average precision). A random ranking has the noise as both. Plain
training, the paper's schedule and an adaptive p are trained with the same seeds; and, with `--cleanlab` (if it is
installed), the ranking of cleanlab (confident learning, Northcutt et al., arXiv 1911.00068) by predictions of plain
trainings on the other folds, which is as much training again for each fold.

Options that are not known here are those of `hf-trim run`, such as `--max_train_samples 500`.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hf_trim  # noqa: F401 (before transformers: it repairs torchvision where torch has no CUDA)


# isort: split
import numpy as np
import torch
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold

from hf_trim.run.arms import CHANGES
from hf_trim.run.recipe import Job, parse
from hf_trim.run.trainer import load_job_data, make_trainer


ARMS = ("plain", "trimmed", "adaptive")
RANKINGS = ("mean_loss", "label_error", "last_loss")
FOLDS = 4


def labels_of(dataset: Any) -> np.ndarray:
    """The labels of a training split."""
    return dataset.labels.cpu().numpy() if hasattr(dataset, "labels") else np.array(dataset["labels"][:])


def scores_of(is_wrong: np.ndarray, ranking: np.ndarray) -> dict[str, float]:
    """
    Args:
        is_wrong (`np.ndarray`): `[n]`, which labels are wrong.
        ranking (`np.ndarray`): `[n]` indices of all samples, the most suspect first.

    Returns:
        `dict[str, float]`: Precision at the number of wrong labels, and average precision.
    """
    suspicion = np.empty(len(is_wrong))
    suspicion[ranking] = -np.arange(len(ranking))
    return {
        "precision": float(is_wrong[ranking[: is_wrong.sum()]].mean()),
        "average_precision": float(average_precision_score(is_wrong, suspicion)),
    }


def run(recipe: str, noise: float, seed: int, options: list[str], with_cleanlab: bool = False) -> list[dict]:
    """
    Train each arm on data with wrong labels, and rank the samples.

    Args:
        recipe (`str`): A recipe of a classifier.
        noise (`float`): The share of wrong labels.
        seed (`int`): The seed of the trainings.
        options (`list[str]`): Further options of the recipe.
        with_cleanlab (`bool`, *optional*, defaults to `False`): Rank by cleanlab as well.

    Returns:
        `list[dict]`: A row for each arm and ranking.
    """
    clean = load_job_data(parse(recipe, options))
    job = parse(recipe, [*options, "--label_noise", str(noise), "--trim_memory"])
    data = load_job_data(job)
    is_wrong = labels_of(clean.train_dataset) != labels_of(data.train_dataset)
    rows = []
    for arm in ARMS:
        with TemporaryDirectory() as folder:
            trainer = make_trainer(job, data, {**CHANGES[arm], "save_strategy": "no"}, seed, Path(folder), title=arm)
            trainer.train()
        for ranking in RANKINGS:
            found = scores_of(is_wrong, trainer.trim_memory.ranking(ranking))
            rows.append({"recipe": recipe, "noise": noise, "seed": seed, "arm": arm, "ranking": ranking, **found})
    if with_cleanlab:
        found = scores_of(is_wrong, rank_by_cleanlab(job, data, seed))
        rows.append({"recipe": recipe, "noise": noise, "seed": seed, "arm": "plain", "ranking": "cleanlab", **found})
    return rows


def rank_by_cleanlab(job: Job, data: Any, seed: int) -> np.ndarray:
    """Train on all folds but one in turn, predict that one, and let cleanlab rank the samples."""
    from cleanlab.rank import order_label_issues

    labels = labels_of(data.train_dataset)
    chances = np.zeros((len(labels), len(data.label_names)))
    whole = data.train_dataset
    for others, own in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(labels, labels):
        data.train_dataset = [whole[int(index)] for index in others]
        with TemporaryDirectory() as folder:
            # No tests on the way: they would need the collator of the whole data.
            changes = {**CHANGES["plain"], "trim_memory": False, "save_strategy": "no", "eval_strategy": "no"}
            trainer = make_trainer(job, data, changes, seed, Path(folder), title="fold")
            if hasattr(whole, "images"):  # whose collator takes mini-batches
                trainer.data_collator = torch.utils.data.default_collate
            trainer.train()
            predicted = trainer.predict([whole[int(index)] for index in own]).predictions
        chances[own] = torch.tensor(predicted).softmax(-1).numpy()
    data.train_dataset = whole
    return order_label_issues(np.ones(len(labels), bool), labels, chances, rank_by="normalized_margin")


def main(arguments: list[str] | None = None) -> None:
    """Print a table of all recipes, and write its rows if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cleanlab", action="store_true")
    parser.add_argument("--output", help="A JSON file of the rows.")
    asked, options = parser.parse_known_args(arguments)
    rows = []
    for recipe, noise, seed in itertools.product(asked.recipes, asked.noise, range(asked.seeds)):
        rows += run(recipe, noise, seed, options, asked.cleanlab)
        if asked.output:
            content = "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"
            Path(asked.output).write_text(content, encoding="utf-8")
    print("| recipe | wrong labels | trained | ranked by | precision at their number | average precision |")
    print("|---|---:|---|---|---:|---:|")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["recipe"], row["noise"], row["arm"], row["ranking"]), []).append(row)
    for (recipe, noise, arm, ranking), found in groups.items():
        cells = [_mean([row[name] for row in found]) for name in ("precision", "average_precision")]
        print(f"| {recipe} | {100 * noise:g} % | {arm} | {ranking} | {' | '.join(cells)} |")


def _mean(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread} %"


if __name__ == "__main__":
    main()
