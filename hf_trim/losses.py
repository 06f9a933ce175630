"""Model outputs + labels → unreduced losses with a validity mask."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_trim.messages import check_choice


IGNORE_INDEX = -100

# Heads of transformers (`PreTrainedModel.loss_type`) whose loss is one of the three of a classification head.
CLASSIFICATION_HEADS = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForVideoClassification",
    "ForAudioClassification",
)
HOW_TO_PASS_A_LOSS = (
    "For any other model pass an unreduced loss, TrimmingTrainer(..., compute_loss_func=f) with "
    "f(outputs, labels, num_items_in_batch=None) returning one loss per sample [B], or one per label in the shape of "
    'the labels (e.g. F.cross_entropy(..., reduction="none")).'
)


class ItemLosses(NamedTuple):
    """
    Args:
        losses (`torch.Tensor`): Unreduced losses, `[B]` or the labels' shape, in float32 at least.
        valid (`torch.Tensor`): Boolean mask of the same shape: what is an item at all.
    """

    losses: Tensor
    valid: Tensor


def valid_items(labels: Tensor, shape: torch.Size) -> Tensor:
    """
    Which items of a batch have a label.

    Args:
        labels (`torch.Tensor`): Labels of any shape whose first dimension is the batch.
        shape (`torch.Size`): Shape of the losses: that of the labels, or `[B]`.

    Returns:
        `torch.Tensor`: Boolean mask of that shape; integer labels of −100 are no items. A sample with several
        labels is an item if one of them is.
    """
    if labels.is_floating_point():
        return torch.ones(shape, dtype=torch.bool, device=labels.device)
    valid = labels != IGNORE_INDEX
    return valid if valid.shape == shape else valid.reshape(shape[0], -1).any(dim=1)


def logits_of(outputs) -> Tensor:
    """
    The logits in a model's outputs.

    Args:
        outputs (`ModelOutput`, `dict` or `tuple`): What the model returned; in a tuple the loss comes first if there
            is one.

    Returns:
        `torch.Tensor`: The logits.
    """
    if isinstance(outputs, dict):
        return outputs["logits"]
    return outputs[0] if outputs[0].dim() > 0 else outputs[1]


class ClassificationLoss:
    """
    The loss of transformers' classification heads for text, images, audio and video, not reduced: cross entropy for
    a single label, binary cross entropy (mean over the classes) for several, squared error (mean over the targets)
    for regression. Which one is decided as transformers does, by `config.problem_type`, else by the number of labels
    and the labels' type.

    Args:
        config (`PretrainedConfig`): The model's configuration.
        label_smoothing (`float`, *optional*, defaults to 0.0): `TrainingArguments.label_smoothing_factor`; single
            label only.
    """

    def __init__(self, config, label_smoothing: float = 0.0):
        self.config = config
        self.label_smoothing = label_smoothing
        problem_type = getattr(config, "problem_type", None)
        if problem_type is not None:
            check_choice(
                "config.problem_type",
                problem_type,
                ("regression", "single_label_classification", "multi_label_classification"),
            )
        if label_smoothing and (problem_type == "regression" or config.num_labels == 1):
            raise ValueError(
                f"label_smoothing_factor={label_smoothing} has no meaning for regression: set it to 0, or give the "
                "model more than one label."
            )

    def problem_type(self, labels: Tensor) -> str:
        """
        Args:
            labels (`torch.Tensor`): `[B]` or `[B, num_labels]` labels.

        Returns:
            `str`: The problem type, as transformers finds it.
        """
        if self.config.problem_type is not None:
            return self.config.problem_type
        if self.config.num_labels == 1:
            return "regression"
        return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"

    def __call__(self, outputs, labels: Tensor) -> Tensor:
        """
        Args:
            outputs (`ModelOutput`, `dict` or `tuple`): The model's outputs, with logits `[B, num_labels]`.
            labels (`torch.Tensor`): `[B]` class indices (−100: no item), `[B, num_labels]` zeros and ones, or `[B]`
                or `[B, num_labels]` numbers.

        Returns:
            `torch.Tensor`: `[B]` losses.
        """
        logits = logits_of(outputs)
        labels = labels.to(logits.device)
        problem_type = self.problem_type(labels)
        if problem_type == "single_label_classification":
            return F.cross_entropy(
                logits.view(-1, self.config.num_labels),
                labels.view(-1),
                ignore_index=IGNORE_INDEX,
                reduction="none",
                label_smoothing=self.label_smoothing,
            )
        logits = logits.flatten(1)
        # One-dimensional labels belong to a single target, of which the logits keep a dimension of size one.
        labels = labels.view(labels.shape[0], -1)
        if labels.shape != logits.shape:
            raise ValueError(
                f"Labels of shape {list(labels.shape)} do not fit the logits' {list(logits.shape)} for "
                f"problem_type='{problem_type}': give one number for each of the config's num_labels, or set "
                "config.problem_type."
            )
        if problem_type == "regression":
            return F.mse_loss(logits, labels, reduction="none").mean(dim=1)
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=1)


def find_loss(model: nn.Module, label_smoothing: float = 0.0) -> ClassificationLoss:
    """
    The unreduced loss that belongs to a model's head.

    Args:
        model (`torch.nn.Module`): A transformers model with a head (already taken out of PEFT's wrapper).
        label_smoothing (`float`, *optional*, defaults to 0.0): Label smoothing factor.

    Returns:
        [`ClassificationLoss`]: `f(outputs, labels)` → `[B]` losses.

    Raises:
        `ValueError`: If the head is not supported.
    """
    loss_type = getattr(model, "loss_type", None)
    if loss_type not in CLASSIFICATION_HEADS:
        raise ValueError(
            f"TrimmingTrainer does not know the loss of {type(model).__name__} (loss_type={loss_type!r}). Supported "
            f"heads of transformers: {', '.join(CLASSIFICATION_HEADS)} (single-label, multi-label, regression; timm "
            f"models through TimmWrapperForImageClassification). {HOW_TO_PASS_A_LOSS}"
        )
    return ClassificationLoss(model.config, label_smoothing)


def item_losses(loss_func: Callable[..., Tensor], outputs, labels: Tensor) -> ItemLosses:
    """
    Call an unreduced loss and find out which of its values are items.

    Args:
        loss_func (`Callable`): `f(outputs, labels)` → losses `[B]` or in the labels' shape.
        outputs: The model's outputs.
        labels (`torch.Tensor`): The labels; the first dimension is the batch.

    Returns:
        [`ItemLosses`]: Losses and validity.

    Raises:
        `ValueError`: If the losses' shape is neither.
    """
    losses = loss_func(outputs, labels)
    shape = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    if not isinstance(losses, Tensor) or losses.shape not in (labels.shape, labels.shape[:1]):
        raise ValueError(
            f"The loss function returned {shape}, where TrimmingTrainer needs one loss per sample "
            f"{list(labels.shape[:1])} or per label {list(labels.shape)}. {HOW_TO_PASS_A_LOSS}"
        )
    # Half precision has too few steps to rank losses by, and to average them in.
    losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
    return ItemLosses(losses, valid_items(labels, losses.shape).to(losses.device))


def per_sample(items: ItemLosses) -> ItemLosses:
    """
    Each sample's mean over its valid items.

    Args:
        items ([`ItemLosses`]): `[B]` or `[B, ...]` losses.

    Returns:
        [`ItemLosses`]: `[B]` losses.
    """
    if items.losses.dim() == 1:
        return items
    valid = items.valid.flatten(1)
    losses = items.losses.flatten(1).masked_fill(~valid, 0.0)
    count = valid.sum(dim=1)
    return ItemLosses(losses.sum(dim=1) / count.clamp(min=1), count > 0)
