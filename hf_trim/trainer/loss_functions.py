"""
Step 2 (per-item losses) of: batch → per-item losses → keep decision → trimmed backward → logs.

Losses that `Trainer` computes outside of the model: those of the user's `compute_loss_func`, and label smoothing. They
are brought into the form that `losses.py` intercepts. For example, a function returns losses `[B]` and what each
counts for, `[B]` class weights: their mean is the sum of the losses divided by the sum of the weights.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_trim.trainer.losses import IGNORE_INDEX, MARK_LOSSES, LossCall, intercepting_batch, mark_losses
from hf_trim.trainer.predictions import predicts


def mean_of_user_losses(returned: Any, labels: Any) -> Tensor:
    """
    The mean of what a user's loss function returned.

    Args:
        returned (`torch.Tensor` or `tuple`): A scalar, which is left alone; or unreduced losses, one for each sample
            `[B]` or for each label (`[B, T]`, `[B·T]`, `[B, T − 1]`); or a tuple of such losses and of what each
            counts for in the mean, 0 for no item.
        labels (`torch.Tensor`): Labels of any shape whose first dimension is the batch. Losses whose integer label is
            −100 count for nothing.

    Returns:
        `torch.Tensor`: The scalar mean.

    Raises:
        `ValueError`: If the losses have another shape.
    """
    losses, counts = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    if isinstance(losses, Tensor) and losses.dim() == 0:
        return losses
    if counts is None:
        valid = _labelled(losses, labels) if isinstance(losses, Tensor) and isinstance(labels, Tensor) else None
        if valid is None:
            shape = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"The loss function returned {shape}, where TrimmingTrainer needs a scalar, or one loss per sample or "
                f"per label {list(getattr(labels, 'shape', ()))}. For losses of another shape return (losses, "
                f"counts), where counts are 1 for an item and 0 for none. {MARK_LOSSES}"
            )
        counts = valid.to(losses)
    counts = counts.detach()
    total = counts.sum()
    weighted = mark_losses(losses, counts).where(counts != 0, 0)
    return weighted.sum() / torch.where(total != 0, total, 1)


def _labelled(losses: Tensor, labels: Tensor) -> Tensor | None:
    """Which losses have a label; `None` if it is not known which loss belongs to which label."""
    valid = labels != IGNORE_INDEX if not labels.is_floating_point() else torch.ones_like(labels, dtype=torch.bool)
    valid = valid.to(losses.device)
    if losses.shape == valid.shape[:1]:  # a sample with several labels is an item if it has one of them
        return valid.reshape(len(losses), -1).any(dim=1)
    for mask in (valid, valid[..., 1:]):
        if losses.numel() == mask.numel():
            return mask.reshape(losses.shape)
    return None


class UserLoss:
    """
    In the place of a trainer's `compute_loss_func`, whose losses may be unreduced: their mean, for the mini-batch's
    share of the labels of the optimizer step.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer.
        function (`Callable`): The user's function.
    """

    def __init__(self, trainer: Any, function: Callable):
        self.trainer, self.function = trainer, function

    def __call__(self, outputs: Any, labels: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """
        Args:
            outputs: The model's outputs.
            labels (`torch.Tensor`): The labels.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): Number of labels of the step.

        Returns:
            `torch.Tensor`: The scalar loss.
        """
        returned = self.function(outputs, labels, num_items_in_batch=num_items_in_batch)
        mean = mean_of_user_losses(returned, labels)
        if mean is returned or not torch.is_grad_enabled():
            return mean
        if num_items_in_batch is None:
            return mean / getattr(self.trainer, "current_gradient_accumulation_steps", 1)
        # As `Trainer` counts: the first label of a text predicts nothing.
        labels = labels[..., 1:] if getattr(self.trainer, "_loss_shifts_labels", False) else labels
        return mean * labels.ne(IGNORE_INDEX).sum() / num_items_in_batch


class SmoothedLoss:
    """
    In the place of transformers' `LabelSmoother`: the same loss, by a loss function of torch that can be intercepted.

    Args:
        trainer ([`TrimmingTrainer`]): The trainer.
        smoother ([`~transformers.trainer_pt_utils.LabelSmoother`]): What is called where nothing is trimmed.
    """

    def __init__(self, trainer: Any, smoother: Any):
        self.trainer, self.smoother = trainer, smoother

    def __call__(
        self, outputs: Any, labels: Tensor, shift_labels: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """
        Args:
            outputs (`ModelOutput`, `dict` or `tuple`): The model's outputs, with logits `[B, ..., C]`.
            labels (`torch.Tensor`): `[B, ...]` class indices; −100 means "no label".
            shift_labels (`bool`, *optional*, defaults to `False`): Whether position t predicts label t + 1.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): Number of labels to divide by, if not that of
                these.

        Returns:
            `torch.Tensor`: The scalar loss.
        """
        batch, plain = intercepting_batch(), None
        if batch is None or batch.keeps_all:
            plain = self.smoother(outputs, labels, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch)
            if batch is None:
                return plain
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if shift_labels:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        arguments: dict[str, Any] = {
            "input": logits.flatten(0, -2), "target": labels.flatten(), "ignore_index": IGNORE_INDEX,
            "label_smoothing": self.smoother.epsilon,
        }  # fmt: skip
        if plain is not None and (plain := batch.if_plain(plain)) is not None:
            with torch.no_grad():
                losses = F.cross_entropy(**arguments, reduction="none")
            counts = arguments["target"] != IGNORE_INDEX
            predict = predicts(arguments["input"], arguments["target"])
            return batch.add(LossCall(losses, counts, "mean", batch.batch_size, plain=plain, predict=predict))
        if num_items_in_batch is None:
            return F.cross_entropy(**arguments)
        return F.cross_entropy(**arguments, reduction="sum") / torch.as_tensor(
            num_items_in_batch, device=logits.device
        )
