"""Accuracy and test error of classifiers, perplexity of language models; without network."""

from collections.abc import Callable
from typing import NamedTuple

import datasets
import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score
from torch import Tensor
from transformers import EvalPrediction


class Accuracy(evaluate.Metric):
    """Accuracy (a fraction) and error (percent). `evaluate.load("accuracy")` would fetch a script from the Hub."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy as a fraction, and error in percent.",
            citation="",
            inputs_description="Predicted and true class numbers.",
            features=datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("int64"))),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        accuracy = float(accuracy_score(references, predictions))
        return {"accuracy": accuracy, "error": 100 * (1 - accuracy)}


def compute_metrics(eval_prediction: EvalPrediction) -> dict[str, float]:
    """
    The metrics of a classifier, for `Trainer`'s argument of the same name.

    Args:
        eval_prediction (`transformers.EvalPrediction`):
            Logits `[N, C]` (or a tuple that begins with them), labels `[N]`.

    Returns:
        `dict[str, float]`: `accuracy`, a fraction, and `error`, the share of wrong predictions in percent.
    """
    logits = eval_prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    # In memory: several trainings at a time must not share a cache file.
    metric = Accuracy(keep_in_memory=True)
    return metric.compute(predictions=np.argmax(logits, axis=-1), references=eval_prediction.label_ids)


def token_losses(logits: Tensor | tuple, labels: Tensor) -> Tensor:
    """
    For `Trainer`'s argument `preprocess_logits_for_metrics`: what perplexity needs of the logits, which would fill the
    memory.

    Args:
        logits (`torch.Tensor` or `tuple`): `[B, T, V]` logits of a causal language model (or what begins with them).
        labels (`torch.Tensor`): `[B, T]` token ids; −100 where there is none.

    Returns:
        `torch.Tensor`: `[B, 3]`: of each text the sum of its tokens' losses, how many they are, and how many of them
        the model predicts.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    sums = []
    for text, target in zip(logits[:, :-1], labels[:, 1:], strict=True):
        losses = F.cross_entropy(text.float(), target, reduction="sum")
        sums.append(torch.stack([losses, (target != -100).sum(), (text.argmax(-1) == target).sum()]).float())
    return torch.stack(sums)


def compute_perplexity(eval_prediction: EvalPrediction) -> dict[str, float]:
    """
    The metrics of a causal language model, for `Trainer`'s argument `compute_metrics`.

    Args:
        eval_prediction (`transformers.EvalPrediction`): What [`token_losses`] returned, `[N, 3]`.

    Returns:
        `dict[str, float]`: `perplexity`, the exponential of the mean loss of all tokens, and `accuracy`, the fraction
        of tokens that are predicted.
    """
    losses, tokens, right = eval_prediction.predictions.astype(np.float64).sum(axis=0)
    return {"perplexity": float(np.exp(losses / tokens)), "accuracy": float(right / tokens)}


class Metric(NamedTuple):
    """
    What the arms of a comparison are compared by; lower is better.

    Args:
        name (`str`): Its name in the records.
        arguments (`dict`): Arguments of `Trainer`.
    """

    name: str
    arguments: dict[str, Callable]


ERROR = Metric("error", {"compute_metrics": compute_metrics})
PERPLEXITY = Metric(
    "perplexity", {"compute_metrics": compute_perplexity, "preprocess_logits_for_metrics": token_losses}
)
