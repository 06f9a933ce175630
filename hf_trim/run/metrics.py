"""Accuracy and test error of classifiers, perplexity of language models. Nothing is downloaded."""

from collections.abc import Callable
from typing import NamedTuple, cast

import datasets
import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score
from torch import Tensor
from transformers import EvalPrediction


class Accuracy(evaluate.Metric):
    """Accuracy (a fraction) and error (percent). `evaluate.load("accuracy")` would download a script from the Hub."""

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
    Compute the metrics of a classifier. To be passed to `Trainer` as `compute_metrics`.

    Args:
        eval_prediction (`transformers.EvalPrediction`):
            Logits `[N, C]` (or a tuple whose first element they are), and labels `[N]`.

    Returns:
        `dict[str, float]`: `accuracy`, a fraction, and `error`, the share of wrong predictions in percent.
    """
    logits = eval_prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    # In memory, because trainings that run at the same time must not share a cache file.
    metric = Accuracy(keep_in_memory=True)
    return metric.compute(predictions=np.argmax(logits, axis=-1), references=eval_prediction.label_ids)


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
