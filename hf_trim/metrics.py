"""Accuracy and test error, without network."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score
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
