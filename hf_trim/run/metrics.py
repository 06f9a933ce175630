"""Accuracy, test error and macro-F1 of classifiers, perplexity of language models. Nothing is downloaded."""

from collections.abc import Callable
from typing import NamedTuple, cast

import datasets
import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from transformers import EvalPrediction

from hf_trim.data import Data, DeviceImages


# Classes are unbalanced if the most frequent one has more than this many times the samples of the rarest.
UNBALANCED = 2


class Accuracy(evaluate.Metric):
    """
    Accuracy and macro-F1 (fractions), and error (percent). `evaluate.load("accuracy")` would download a script from
    the Hub.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy and macro-F1 as fractions, and error in percent.",
            citation="",
            inputs_description="Predicted and true class numbers.",
            features=datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("int64"))),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        accuracy = float(accuracy_score(references, predictions))
        # Over the classes that occur: one that does not cannot be found, and would count as never found.
        macro_f1 = f1_score(references, predictions, labels=np.unique(references), average="macro", zero_division=0)
        return {"accuracy": accuracy, "error": 100 * (1 - accuracy), "macro_f1": float(macro_f1)}


def compute_metrics(eval_prediction: EvalPrediction) -> dict[str, float]:
    """
    Compute the metrics of a classifier. To be passed to `Trainer` as `compute_metrics`.

    Args:
        eval_prediction (`transformers.EvalPrediction`):
            Logits `[N, C]` (or a tuple whose first element they are), and labels `[N]`.

    Returns:
        `dict[str, float]`: `accuracy`, a fraction; `error`, the share of wrong predictions in percent; and `macro_f1`,
            the mean over the classes of their F1, a fraction.
    """
    logits = eval_prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    # In memory, because trainings that run at the same time must not share a cache file.
    metric = Accuracy(keep_in_memory=True)
    return metric.compute(predictions=np.argmax(logits, axis=-1), references=eval_prediction.label_ids)


def describe_classes(data: Data) -> dict:
    """
    Describe how often each class occurs.

    Args:
        data ([`~hf_trim.data.Data`]): The data of a recipe.

    Returns:
        `dict`: `majority_error`, the test error in percent of always the most frequent class of the test split; and
            `is_unbalanced`, whether some class of the training or the test split is more than `UNBALANCED` times as
            frequent as another one. Empty for a language model.
    """
    if data.kind == "language":
        return {}
    train, test = (
        np.unique(_labels_of(split), return_counts=True)[1] for split in (data.train_dataset, data.test_dataset)
    )
    return {
        "majority_error": float(100 * (1 - test.max() / test.sum())),
        "is_unbalanced": any(counts.max() > UNBALANCED * counts.min() for counts in (train, test)),
    }


def _labels_of(split: datasets.Dataset | DeviceImages) -> np.ndarray:
    if isinstance(split, DeviceImages):
        return split.labels.cpu().numpy()
    return np.array(split.with_format(None)["labels"][:])  # a transform of images would run over all of them


def sum_token_losses(logits: Tensor | tuple, labels: Tensor) -> Tensor:
    """
    Reduce logits to what perplexity needs, since the logits of a whole test split do not fit into memory. To be passed
    to `Trainer` as `preprocess_logits_for_metrics`.

    Args:
        logits (`torch.Tensor` or `tuple`): `[B, T, V]` logits of a causal language model (or a tuple whose first
            element they are).
        labels (`torch.Tensor`): `[B, T]` token ids; −100 where a token has no label.

    Returns:
        `torch.Tensor`: `[B, 3]`: for each text the sum of the token losses, the number of tokens, and the number of
            tokens that the model predicts correctly.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    sums = []
    # Text by text: the losses of a batch in float32 would take as much memory again as its logits.
    for text, target in zip(logits[:, :-1], labels[:, 1:], strict=True):
        losses = F.cross_entropy(text.float(), target, reduction="sum")
        sums.append(torch.stack([losses, (target != -100).sum(), (text.argmax(-1) == target).sum()]).float())
    return torch.stack(sums)


def compute_perplexity(eval_prediction: EvalPrediction) -> dict[str, float]:
    """
    Compute the metrics of a causal language model. To be passed to `Trainer` as `compute_metrics`.

    Args:
        eval_prediction (`transformers.EvalPrediction`): Predictions `[N, 3]`, which [`sum_token_losses`] returned.

    Returns:
        `dict[str, float]`: `perplexity`, the exponential of the mean loss over all tokens, and `accuracy`, the
            fraction of tokens that the model predicts correctly.
    """
    predictions = cast(np.ndarray, eval_prediction.predictions)
    loss, num_tokens, num_correct = predictions.astype(np.float64).sum(axis=0)
    return {"perplexity": float(np.exp(loss / num_tokens)), "accuracy": float(num_correct / num_tokens)}


class Metric(NamedTuple):
    """
    The metric by which the arms of a comparison are compared. Lower is better.

    Args:
        name (`str`): Its name in the records.
        arguments (`dict`): The arguments of `Trainer` that compute it.
    """

    name: str
    arguments: dict[str, Callable]


ERROR = Metric("error", {"compute_metrics": compute_metrics})
PERPLEXITY = Metric(
    "perplexity", {"compute_metrics": compute_perplexity, "preprocess_logits_for_metrics": sum_token_losses}
)
