"""
A user's programs as in README.md, for `mypy` alone: they are checked, and never run.

Each public name is used, and each result has the type that its user relies on. A name that loses its type becomes
`Any`, which fits everywhere: so `assert_type` stands where a result is handed on.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from typing_extensions import assert_type

from hf_trim import (
    TrimmingArguments,
    TrimmingConfig,
    TrimmingMixin,
    TrimmingTrainer,
    linear_fraction,
    mark_losses,
    select_items,
    skip_zero_rows,
    trimmed_linear_cross_entropy,
    trimmed_mean,
)
from hf_trim.backward import (
    BACKWARD_CHOICES,
    NotRowwiseError,
    checked,
    fallback_report,
    implements,
    reset_fallbacks,
    strict,
    take_kept,
    take_rows_sparse,
)


# ---- the swap -----------------------------------------------------------------------------------------------------


def focal_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    losses = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
    return (1 - torch.exp(-losses)) ** 2 * losses


def swap(model: PreTrainedModel, train_dataset: Dataset, eval_dataset: Dataset) -> dict[str, float]:
    args: TrainingArguments = TrimmingArguments("out", num_train_epochs=10, trim_keep_end=0.2)
    trainer: Trainer = TrimmingTrainer(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset)
    trainer.train()
    return trainer.evaluate()


def own_loss(model: PreTrainedModel, args: TrimmingArguments, train_dataset: Dataset) -> float:
    trainer = TrimmingTrainer(model, args, compute_loss_func=focal_loss, train_dataset=train_dataset)
    trainer.train(resume_from_checkpoint=True)
    trims: bool = trainer.trim.trims
    fraction: float = trainer.keep_fraction
    return assert_type(fraction, float) if trims else 1.0


# ---- in front of another trainer ----------------------------------------------------------------------------------


@dataclass
class MyArguments(TrimmingConfig, Seq2SeqTrainingArguments):
    my_field: int = 3


class MyTrainer(TrimmingMixin, Seq2SeqTrainer):
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def mixed(model: PreTrainedModel, train_dataset: Dataset) -> None:
    args = MyArguments("out", trim_backward="sparse", trim_strict=True, predict_with_generate=True)
    trainer: Seq2SeqTrainer = MyTrainer(model, args, train_dataset=train_dataset)
    trainer.train()
    settings: TrimmingConfig = args
    assert_type(settings.trim_keep_start, float)
    assert_type(settings.trim_select, str)


# ---- a loop of one's own ------------------------------------------------------------------------------------------


def loop(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: Iterable[tuple[Tensor, Tensor]], num_epochs: int
) -> None:
    for epoch in range(num_epochs):
        p: float = assert_type(linear_fraction(epoch, num_epochs, start=1.0, end=0.2), float)
        for images, labels in loader:
            losses = torch.nn.functional.cross_entropy(model(images), labels, reduction="none")
            loss: Tensor = assert_type(trimmed_mean(losses, keep=p, backward="sparse"), Tensor)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def replayed(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    def losses_of(kept: Tensor | None) -> Tensor:
        rows = slice(None) if kept is None else kept
        return torch.nn.functional.cross_entropy(model(images[rows]), labels[rows], reduction="none")

    return trimmed_mean(losses_of, 0.2, valid=None, nonfinite="drop", backward="replay", model=model)


def focal(losses: Tensor, weights: Tensor) -> Tensor:
    focal_losses = weights * (1 - torch.exp(-losses)) ** 2 * losses
    return mark_losses(assert_type(mark_losses(focal_losses, counts=weights), Tensor), scores=losses).mean()


def tokens(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    loss = trimmed_linear_cross_entropy(
        hidden, head.weight, labels, keep=0.2, bias=head.bias, select="random", generator=generator
    )
    return assert_type(loss, Tensor)


def kept_losses(losses: Tensor, labels: Tensor, backward: str) -> Tensor:
    kept: Tensor = assert_type(select_items(losses, 0.4, valid=labels != -100, select="hardest"), Tensor)
    if backward not in BACKWARD_CHOICES:
        return assert_type(take_rows_sparse(losses, kept), Tensor)
    return assert_type(take_kept(losses, kept, backward), Tensor)


def hinge(scores: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.multi_margin_loss(assert_type(skip_zero_rows(scores), Tensor), labels)


# ---- the backward pass --------------------------------------------------------------------------------------------


@implements("soft_margin_loss_backward")
def soft_margin_loss_backward(func: Callable[..., Any], grad: Any, x: Tensor, target: Tensor, reduction: int) -> Any:
    if reduction != 0:
        raise NotRowwiseError("the loss is reduced")
    return grad.like(func(grad.payload, grad.kept_rows(x), grad.kept_rows(target), reduction))


def watched(loss: Tensor) -> dict[str, int]:
    reset_fallbacks()
    with strict(), checked(enabled=False):
        loss.backward()
    return assert_type(fallback_report(), dict[str, int])
