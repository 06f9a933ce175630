"""
Step 2 (per-item losses) of: batch → per-item losses → keep decision → trimmed backward → logs.

The loss functions of torch that a model calls in its forward pass are intercepted: the model gets the mean that it
asked for, and the unreduced losses are recorded. For example, logits `[B·T, C]` and targets `[B·T]`, of which −100 are
not labelled: the losses `[B·T]`, their counts `[B·T]` (1, or 0 without a label), and a scalar mean for the model.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from hf_trim.trainer.heads import PASS_A_LOSS
from hf_trim.trainer.lm_head import LazyLogits, LMHead


IGNORE_INDEX = -100


@dataclass
class LossCall:
    """
    One call of a loss function.

    Args:
        losses (`torch.Tensor`): `[n]` unreduced losses in float32 at least; n is the batch size, or a multiple of it.
        counts (`torch.Tensor`): `[n]`, what each loss counts for in the mean: 1, a class weight, or 0 without a label.
        reduction (`str`): `"mean"` (the sum of the losses divided by the sum of the counts) or `"sum"`.
        ignore_index (`int`, *optional*, defaults to -100): The label that means "no label".
        logits ([`~hf_trim.trainer.lm_head.LazyLogits`], *optional*): If given, the losses have no graph. The kept ones
            are computed again, with their gradients.
    """

    losses: Tensor
    counts: Tensor
    reduction: str
    ignore_index: int = IGNORE_INDEX
    logits: LazyLogits | None = None

    def __post_init__(self):
        # Half precision has too few steps to rank losses by, and to average them in.
        self.losses = self.losses.flatten().to(torch.promote_types(self.losses.dtype, torch.float32))
        self.counts = self.counts.flatten().to(self.losses)
        self.finite = self.losses.detach().isfinite()
        # The mean that the model gets. It is a leaf, so that its gradient tells its weight in the model's loss.
        with torch.no_grad():
            total = self.losses.where(self.finite, 0).sum()
            count = self.counts.where(self.finite, 0).sum()
            self.value = total if self.reduction == "sum" else torch.where(count > 0, total / count, 0)
        self.value.requires_grad_(torch.is_grad_enabled())


def _class_losses(func: Callable, arguments: dict[str, Any], batch_size: int, reduction: str) -> dict[str, Any]:
    """From `[N, C, ...]` logits or log-probabilities: one loss for each target `[N, ...]`."""
    logits, target, weight = arguments["input"], arguments["target"], arguments["weight"]
    if isinstance(logits, LazyLogits) and logits.can_score(target):
        losses = logits.score(**arguments)
    else:
        losses, logits = func(**arguments), None
    if target.is_floating_point():
        counts = torch.ones_like(losses, requires_grad=False)
    else:
        valid = target != arguments["ignore_index"]
        counts = valid if weight is None else weight[target.where(valid, 0)] * valid
    return {"losses": losses, "counts": counts, "ignore_index": arguments["ignore_index"], "logits": logits}


def _sample_losses(func: Callable, arguments: dict[str, Any], batch_size: int, reduction: str) -> dict[str, Any]:
    """From `[B, ...]` predictions, each with a target: one loss for each sample, the mean (or sum) over it."""
    losses = func(**arguments).reshape(batch_size, -1)
    counts = losses.new_ones(batch_size, requires_grad=False)
    if reduction == "sum":
        return {"losses": losses.sum(1), "counts": counts * losses.shape[1]}
    return {"losses": losses.mean(1), "counts": counts}


def _ctc_losses(func: Callable, arguments: dict[str, Any], batch_size: int, reduction: str) -> dict[str, Any]:
    """
    From `[T, B, C]` log-probabilities: one loss for each sequence. In a mean, torch divides it by the length of its
    target first.
    """
    losses = func(**arguments)
    if reduction == "mean":
        losses = losses / torch.as_tensor(arguments["target_lengths"], device=losses.device).clamp(min=1)
    return {"losses": losses, "counts": torch.ones_like(losses, requires_grad=False)}


# Loss function → a function that computes its unreduced losses, from its arguments with reduction="none".
UNREDUCED: dict[Callable, Callable] = {
    F.cross_entropy: _class_losses,
    F.nll_loss: _class_losses,
    F.binary_cross_entropy: _sample_losses,
    F.binary_cross_entropy_with_logits: _sample_losses,
    F.mse_loss: _sample_losses,
    F.l1_loss: _sample_losses,
    F.smooth_l1_loss: _sample_losses,
    F.huber_loss: _sample_losses,
    F.ctc_loss: _ctc_losses,
}
_SIGNATURES = {func: inspect.signature(func) for func in UNREDUCED}


class LossCalls(TorchFunctionMode):
    """
    In this context, torch's loss functions return a leaf tensor with their ordinary value, and what they averaged (or
    summed) is recorded in `calls`.

    Args:
        batch_size (`int`): Number B of samples.
        head ([`~hf_trim.trainer.lm_head.LMHead`], *optional*): The layer whose logits are computed in chunks.
        base_model (`torch.nn.Module`, *optional*): The model without its head.
        skip_base_model (`bool`, *optional*, defaults to `False`): Whether to let the base model's functions alone,
            because it is known to call no loss function. To look at each function takes some microseconds.
    """

    def __init__(
        self,
        batch_size: int,
        head: LMHead | None = None,
        base_model: nn.Module | None = None,
        skip_base_model: bool = False,
    ):
        super().__init__()
        self.batch_size = batch_size
        self.head = head
        self.calls: list[LossCall] = []
        self.called_in_base_model = False
        self._base_model, self._skip_base_model = base_model, skip_base_model
        self._in_base_model = False
        self._hooks: list[RemovableHandle] = []

    def __enter__(self):
        if self._base_model is not None:
            self._hooks = [
                self._base_model.register_forward_pre_hook(lambda *_: self._enter_base_model()),
                self._base_model.register_forward_hook(lambda *_: self._leave_base_model(), always_call=True),
            ]
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*error)

    def _enter_base_model(self) -> None:
        self._in_base_model = True
        if self._skip_base_model:
            super().__exit__(None, None, None)

    def _leave_base_model(self) -> None:
        self._in_base_model = False
        if self._skip_base_model:
            super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in UNREDUCED:
            bound = _SIGNATURES[func].bind(*args, **kwargs)
            bound.apply_defaults()
            if bound.arguments["reduction"] in ("mean", "sum"):
                return self._record(func, bound.arguments)
        elif func is F.linear and self.head is not None and self.head.computes(*args, **kwargs):
            return LazyLogits(*args, **kwargs, keep_all=self.head.keep_all)
        return func(*args, **kwargs)

    def _record(self, func: Callable, arguments: dict[str, Any]) -> Tensor:
        reduction = arguments["reduction"]
        self.called_in_base_model |= self._in_base_model
        fields = UNREDUCED[func](func, {**arguments, "reduction": "none"}, self.batch_size, reduction)
        self.calls.append(LossCall(reduction=reduction, **fields))
        return self.calls[-1].value


def labelled_losses(losses: Any, labels: Tensor) -> LossCall:
    """
    The unreduced losses that a user's loss function returned.

    Args:
        losses (`torch.Tensor`): Losses `[B]`, or in the shape of the labels.
        labels (`torch.Tensor`): The labels; the first dimension is the batch.

    Returns:
        [`LossCall`]: The losses; those without a label (integer −100) count for nothing.

    Raises:
        `ValueError`: If the losses have another shape.
    """
    shape = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    if not isinstance(losses, Tensor) or losses.shape not in (labels.shape, labels.shape[:1]):
        raise ValueError(
            f"The loss function returned {shape}, where TrimmingTrainer needs one loss per sample "
            f"{list(labels.shape[:1])} or per label {list(labels.shape)}. {PASS_A_LOSS}"
        )
    return LossCall(losses, valid_items(labels, losses.shape).to(losses.device), "mean")


def valid_items(labels: Tensor, shape: torch.Size) -> Tensor:
    """
    Which items of a batch have a label.

    Args:
        labels (`torch.Tensor`): Labels of any shape whose first dimension is the batch.
        shape (`torch.Size`): Shape of the losses: that of the labels, or `[B]`.

    Returns:
        `torch.Tensor`: Boolean mask of that shape, false for integer labels of −100. A sample with several labels is
        valid if one of them is.
    """
    if labels.is_floating_point():
        return torch.ones(shape, dtype=torch.bool, device=labels.device)
    valid = labels != IGNORE_INDEX
    return valid if valid.shape == shape else valid.reshape(shape[0], -1).any(dim=1)


def smoothed_losses(outputs: Any, labels: Tensor, epsilon: float, shift_labels: bool) -> LossCall:
    """
    The unreduced losses of transformers' label smoothing.

    Args:
        outputs (`ModelOutput`, `dict` or `tuple`): The model's outputs, with logits `[B, ..., C]`.
        labels (`torch.Tensor`): `[B, ...]` class indices; −100 means "no label".
        epsilon (`float`): Label smoothing factor.
        shift_labels (`bool`): Whether position t predicts label t + 1.

    Returns:
        [`LossCall`]: The losses.
    """
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    if shift_labels:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    losses = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none", label_smoothing=epsilon
    )
    return LossCall(losses, labels.flatten() != IGNORE_INDEX, "mean")
