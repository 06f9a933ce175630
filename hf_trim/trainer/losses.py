"""
Step 2 (per-item losses) of: batch → per-item losses → keep decision → trimmed backward → logs.

The loss functions of torch that are called while the loss of a batch is computed are intercepted, in the model's
forward pass or after it. The caller gets the mean that it asked for, of the whole batch. It is a node of the graph: in
the backward pass the weight that the mean has in the loss arrives there, and goes on to the kept items only.

For example, logits `[B·T, C]` and targets `[B·T]`, of which −100 are not labelled: the losses `[B·T]`, their counts
`[B·T]` (1, or 0 without a label), and the scalar mean. In the backward pass its gradient w arrives, and each of k kept
losses gets w/k.
"""

import inspect
import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_trim.backward import waiting
from hf_trim.backward._torch_internals import is_transforming
from hf_trim.backward.eager.sparse import row_gradient
from hf_trim.trainer.kept import Kept
from hf_trim.trainer.late_checks import LateChecks
from hf_trim.trainer.lm_head import LazyLogits, LMHead
from hf_trim.trainer.predictions import predicts


if TYPE_CHECKING:
    from hf_trim.trainer.batch import TrimmedBatch

IGNORE_INDEX = -100
MARK_LOSSES = (
    "Take the mean with a loss function of torch (reduction='mean' or 'sum'); or, for a loss by hand, wrap the "
    "unreduced losses, one per sample or token, in hf_trim.mark_losses(losses) before their mean is taken; or pass "
    "compute_loss_func=f, where f(outputs, labels, num_items_in_batch=None) returns them unreduced."
)

NO_PART = f"The loss does not depend on any call of a loss function of torch. {MARK_LOSSES}"


class LossCall:
    """
    One call of a loss function, or of [`mark_losses`].

    Args:
        losses (`torch.Tensor`): `[n]` losses, one for each item.
        counts (`torch.Tensor`): `[n]`, what each loss counts for in the mean: 1, a class weight, or 0 without a label.
        reduction (`str`): `"mean"` (the sum of the losses divided by the sum of the counts), `"sum"`, or `"none"`.
        batch_size (`int`): Number B of samples.
        scale (`float`, *optional*, defaults to 1.0): Factor of a sum, the size of an item where losses are means over
            it.
        kind (`tuple`, *optional*): The function and its number of classes: pieces of one loss have the same.
        target (`torch.Tensor`, *optional*): The targets: losses over the same items have the same.
        ignore_index (`int`, *optional*, defaults to -100): The label that means "no label".
        logits ([`~hf_trim.trainer.lm_head.LazyLogits`], *optional*): If given, the losses have no graph. The gradients
            of the kept ones are computed from the logits.
        scores (`torch.Tensor`, *optional*): `[n]`, what items are ranked by, if not by their losses.
        mass (`Callable`, *optional*): Returns the `[n]` gradient mass of the items; without, it is their scores.
        plain (`torch.Tensor`, *optional*): The function's own result, if everything is kept.
        predict (`Callable`, *optional*): Where there is one class for each item: returns the probability of its label,
            the predicted class and the label, each `[n]`.
    """

    def __init__(
        self,
        losses: Tensor,
        counts: Tensor,
        reduction: str,
        batch_size: int,
        *,
        scale: float = 1.0,
        kind: tuple = (),
        target: Tensor | None = None,
        ignore_index: int | None = IGNORE_INDEX,
        logits: LazyLogits | None = None,
        scores: Tensor | None = None,
        mass: Callable[[], Tensor] | None = None,
        plain: Tensor | None = None,
        predict: Callable[[], tuple[Tensor, Tensor, Tensor]] | None = None,
    ):
        # One row for each sample, if there are as many losses for each: [B·T] tokens are [B, T].
        rows = batch_size if losses.numel() % batch_size == 0 else losses.numel()
        shape, dtype = (rows, losses.numel() // max(rows, 1)), losses.dtype
        # Half precision has too few steps to rank losses by, and to average them in.
        self.losses = losses.reshape(shape).to(torch.promote_types(dtype, torch.float32))
        self.counts = counts.detach().reshape(shape).to(self.losses)
        self.scores = self.losses.detach() if scores is None else scores.detach().reshape(shape).to(self.losses)
        self.reduction, self.scale, self.kind, self.target = reduction, scale, kind, target
        self.ignore_index, self.logits, self.predict = ignore_index, logits, predict
        # How many losses can have a label, as far as the host knows.
        self.most_labels = losses.numel() if logits is None else logits.most_labels
        self._mass = mass
        self.labelled = self.counts != 0
        self.finite = self.losses.detach().isfinite()
        self.kept: Kept | None = None  # once the items to keep are chosen
        self.is_unknown = False  # whether the first pass of a replay has not shown what is kept
        self.used = False  # whether the backward pass has come here
        # As the backward pass weighs them: its value, and the difference of the trimmed value from it.
        self.weighted: Tensor | float = 0.0
        self.difference: Tensor | float = 0.0
        detached, counted = self.losses.detach().where(self.finite, 0), self.counts.where(self.finite, 0)
        count = counted.sum()
        mean = torch.where(count != 0, detached.sum() / count, 0)
        # Without an item a mean is NaN. Where the host may not look, the device leaves it out.
        self.plain = plain if plain is None or plain.dim() else plain.where(self.labelled.any(), 0)
        self.full: Tensor = {"mean": mean, "sum": mean * self.counts.sum() * scale, "none": detached}[reduction]
        self._dtype = dtype

    def rank_by(self, score: Callable[[Tensor], Tensor], may_be_per_sample: bool, checks: LateChecks) -> None:
        """
        Rank the items by what a function of their losses returns. That is their mass as well.

        Args:
            score (`Callable`): `[B, T]` losses, or `[B]` if there is one for each sample, to scores of that shape.
            may_be_per_sample (`bool`): Whether it may return one score `[B]` for each sample, where T is above 1.
            checks ([`~hf_trim.trainer.late_checks.LateChecks`]): Finds scores that are not finite.

        Raises:
            `ValueError`: If the scores have another shape, or are not finite.
        """
        losses = self.losses.detach().clone()  # the function may change them
        losses = losses[:, 0] if losses.shape[1] == 1 else losses
        with torch.no_grad():
            scores = score(losses)
        shapes = [losses.shape] + [losses.shape[:1]] * may_be_per_sample
        if not isinstance(scores, Tensor) or scores.shape not in shapes:
            found = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            hint = "" if may_be_per_sample else " (or use trim_unit='sample', and return one for each sample)"
            raise ValueError(f"trim_score must return one score for each of the losses {list(losses.shape)}, and "
                             f"returned {found}: return that shape{hint}.")  # fmt: skip
        scores = scores.to(self.losses)
        scores = scores[:, None].expand_as(self.losses) if scores.dim() == 1 else scores
        message = "trim_score returned {count} scores that are NaN or infinite: items cannot be ranked."
        checks.refuse((~scores.isfinite() & self.labelled & self.finite).sum(), message)
        self.scores, self._mass = scores.where(self.labelled, 0), None

    def mass(self) -> Tensor:
        """
        Returns:
            `torch.Tensor`: `[B, T]`, how much each item moves the model, up to a factor: the norm of the gradient of
            its loss for the input of the loss function.
        """
        mass = self.scores.clamp(min=0) if self._mass is None else self._mass().detach().reshape(self.losses.shape)
        return mass.to(self.losses).where(self.labelled & self.finite, 0)

    def value(self, is_scoring: bool) -> Tensor:
        """
        What the caller gets: the value of the whole batch, as a node of the graph.

        Args:
            is_scoring (`bool`): Whether it is the first pass of a replay, in which the model has no graph. What is
                computed from its outputs has one from here on.

        Returns:
            `torch.Tensor`: A scalar; `[B, T]` losses if there is no reduction.
        """
        full = (self.losses.detach() if self.reduction == "none" else self.full).to(self._dtype)
        if is_scoring:
            return full.clone().requires_grad_(torch.is_grad_enabled())
        if self.logits is not None:
            return self.logits.attach(full, self._choose)
        return _Node.apply(self.losses if self.plain is None else self.plain, full, self)

    def _choose(self, grad: Tensor) -> Kept:
        """What is kept, with the gradient of each kept loss as its factor, from the weight of the mean."""
        if self.kept is None:  # a backward pass before the loss is complete, which is not the training's
            return self._all(grad)
        self.used = True
        elements, factor, rows, is_kept = self.kept
        if self.is_unknown:
            raise ValueError(
                "In the second pass of a replay the loss depends on a call of a loss function on which it did not in "
                "the first one: set trim_backward='sparse'."
            )
        # Without an item in the whole step its loss is 0 / 0, and the weight may be infinite.
        gradients = torch.where(factor != 0, grad.to(self.losses) * factor, 0)
        weights = gradients.detach()
        losses = self.losses.detach().flatten()[elements]
        losses = losses if is_kept is None else losses.where(is_kept, 0)
        if self.reduction == "none":
            weights, whole = weights.flatten()[elements], (grad.detach() * self.full).sum()
        else:
            whole = grad.detach() * self.full
        self.weighted = self.weighted + whole
        self.difference = self.difference + ((weights * losses).sum() - whole)
        return Kept(elements, gradients, rows, is_kept)

    def _all(self, grad: Tensor) -> Kept:
        """The same for the loss of the whole batch."""
        elements = (self.finite & self.labelled).flatten().nonzero().flatten()
        unit: Any = {"mean": 1 / self.counts.flatten()[elements].sum(), "sum": self.scale, "none": 1.0}[self.reduction]
        return Kept(elements, grad.to(self.losses) * unit)

    def gradient(self, grad: Tensor) -> Tensor:
        """
        Args:
            grad (`torch.Tensor`): The gradient of [`value`]: the weight of the mean in the loss.

        Returns:
            `torch.Tensor`: The gradient of the losses, zero for all but the kept ones.
        """
        if self.plain is not None:
            self.used = True
            self.weighted = self.weighted + (grad * self.plain).detach().sum()
            return grad
        elements, weights, rows, is_kept = self._choose(grad)
        weights = weights.flatten()[elements] if self.reduction == "none" else weights.expand(len(elements))
        weights = weights if is_kept is None else weights.where(is_kept, 0)
        dense = torch.zeros_like(self.losses).flatten().index_copy(0, elements, weights).view(self.losses.shape)
        return dense if rows is None else row_gradient(dense.index_select(0, rows.index), rows)


class _Node(torch.autograd.Function):
    """The place of a call's value in the graph."""

    @staticmethod
    def forward(ctx, source, value, call):
        ctx.call = call
        return (source if call.plain is not None else value).clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.call.gradient(grad), None, None


# ---- the losses of torch's functions ------------------------------------------------------------------------------


def _class_losses(func: Callable, arguments: dict[str, Any], reduction: str) -> dict[str, Any]:
    """From `[N, C, ...]` logits or log-probabilities: one loss for each target `[N, ...]`."""
    logits, target, weight = arguments["input"], arguments["target"], arguments["weight"]
    ignore_index = arguments["ignore_index"]
    is_lazy = isinstance(logits, LazyLogits) and logits.can_score(target)
    losses = logits.score(**arguments) if is_lazy else func(**arguments)
    if target.is_floating_point():  # probabilities of the classes
        counts = torch.ones_like(losses, requires_grad=False)
    else:
        valid = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
        counts = valid if weight is None else weight[target.where(valid, 0)] * valid
    classes = arguments.get("linear_weight", logits).shape[-1 if logits.dim() == 1 else 1]

    def mass() -> Tensor:
        # With q the target and p the prediction, the loss is H(q) + KL(q | p). Without label smoothing H(q) is 0 and
        # the gradient for the logits has the norm u to √2·u, u = 1 − p(target) = 1 − exp(−loss).
        scale = counts.where(counts != 0, 1).to(losses)
        return scale * -torch.expm1((_least_loss(arguments, classes) - losses.detach() / scale).clamp(max=0))

    return {
        "losses": losses, "counts": counts, "reduction": reduction, "ignore_index": ignore_index, "target": target,
        "kind": (func, classes), "logits": logits if is_lazy else None, "mass": mass,
        "predict": None if "linear_weight" in arguments else predicts(logits, target),
    }  # fmt: skip


def _least_loss(arguments: dict[str, Any], classes: int) -> Tensor | float:
    """The entropy of the target: the cross entropy of the best prediction."""
    target, smoothing = arguments["target"], arguments.get("label_smoothing", 0.0)
    if target.is_floating_point():
        target = target * (1 - smoothing) + smoothing / classes
        return torch.special.entr(target).sum(-1 if target.dim() == 1 else 1)
    other = smoothing / classes
    own = 1 - smoothing + other
    return -own * math.log(own) - (classes - 1) * other * math.log(other) if smoothing else 0.0


def _row_losses(func: Callable, arguments: dict[str, Any], reduction: str) -> dict[str, Any]:
    """From `[n, ...]` predictions, each with a target: one loss for each row, the mean over it."""
    losses = torch.atleast_1d(func(**arguments))
    losses = losses.flatten(1) if losses.dim() > 1 else losses[:, None]
    fields: dict[str, Any] = {"target": arguments.get("target"), "kind": (func, losses.shape[1])}
    fields["mass"] = lambda: _gradient_norms(func, arguments, reduction)
    if func in (F.mse_loss, F.l1_loss) and arguments["weight"] is not None:  # their mean is divided by the weights
        counts = arguments["weight"].reshape(losses.shape).sum(1)
        return {**fields, "losses": losses.sum(1), "counts": counts, "reduction": reduction}
    fields["counts"] = losses.new_ones(losses.shape[0], requires_grad=False)
    if reduction == "batchmean":  # a sum, divided by the number of rows
        return {**fields, "losses": losses.sum(1), "reduction": "mean"}
    return {**fields, "losses": losses.mean(1), "scale": losses.shape[1], "reduction": reduction}


def _gradient_norms(func: Callable, arguments: dict[str, Any], reduction: str) -> Tensor:
    """The norm of the gradient of each row's loss for the row's prediction, the first argument."""
    name = next(iter(arguments))
    with torch.enable_grad():
        prediction = arguments[name].detach().requires_grad_()
        arguments = {key: x.detach() if isinstance(x, Tensor) else x for key, x in arguments.items()}
        losses = _row_losses(func, {**arguments, name: prediction}, reduction)["losses"]
        (gradient,) = torch.autograd.grad(losses.sum(), prediction)
    return torch.atleast_1d(gradient).flatten(1).norm(dim=1) if gradient.dim() > 1 else gradient.abs()


def _ctc_losses(func: Callable, arguments: dict[str, Any], reduction: str) -> dict[str, Any]:
    """
    From `[T, B, C]` log-probabilities: one loss for each sequence. In a mean, torch divides it by the length of its
    target first.
    """
    losses = func(**arguments)
    mass = -torch.expm1(-losses.detach())  # 1 − the probability of the target
    if reduction == "mean":
        losses = losses / torch.as_tensor(arguments["target_lengths"], device=losses.device).clamp(min=1)
    counts = torch.ones_like(losses, requires_grad=False)
    return {"losses": losses, "counts": counts, "reduction": reduction, "mass": lambda: mass}


# Loss function → a function that computes its unreduced losses, from its arguments with reduction="none".
UNREDUCED: dict[Callable, Callable] = {
    F.cross_entropy: _class_losses,
    F.nll_loss: _class_losses,
    F.ctc_loss: _ctc_losses,
    **dict.fromkeys(
        (
            F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.mse_loss, F.l1_loss, F.smooth_l1_loss,
            F.huber_loss, F.kl_div, F.gaussian_nll_loss, F.poisson_nll_loss, F.soft_margin_loss, F.multi_margin_loss,
            F.multilabel_margin_loss, F.multilabel_soft_margin_loss, F.hinge_embedding_loss, F.cosine_embedding_loss,
            F.margin_ranking_loss, F.triplet_margin_loss, F.triplet_margin_with_distance_loss,
        ),
        _row_losses,
    ),
}  # fmt: skip
if hasattr(F, "linear_cross_entropy"):  # new in torch 2.13
    UNREDUCED[F.linear_cross_entropy] = _class_losses
_SIGNATURES = {func: inspect.signature(func) for func in UNREDUCED}
_ACTIVE: ContextVar["TrimmedBatch | None"] = ContextVar("_ACTIVE", default=None)


class LossCalls(TorchFunctionMode):
    """
    In this context, calls of torch's loss functions become [`LossCall`]s of a mini-batch.

    Args:
        batch ([`~hf_trim.trainer.batch.TrimmedBatch`]): The mini-batch.
        head ([`~hf_trim.trainer.lm_head.LMHead`], *optional*): The layer whose logits are computed in chunks.
    """

    def __init__(self, batch: "TrimmedBatch", head: LMHead | None = None):
        super().__init__()
        self.batch, self.head = batch, head

    def __enter__(self):
        self._token = _ACTIVE.set(self.batch)
        return super().__enter__()

    def __exit__(self, *error):
        _ACTIVE.reset(self._token)
        return super().__exit__(*error)

    def let_alone(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """Runs a compiled part of a model, in which nothing can be intercepted."""
        super().__exit__(None, None, None)
        try:
            return forward(*args, **kwargs)
        finally:
            super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in UNREDUCED and not torch.is_grad_enabled():
            self.batch.skip_scored()
        if func in UNREDUCED and self.batch.is_recording and not is_transforming():
            bound = _SIGNATURES[func].bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = bound.arguments
            is_legacy = arguments.get("size_average") is not None or arguments.get("reduce") is not None
            if arguments["reduction"] in ("mean", "sum", "batchmean") and not is_legacy:
                return self._record(func, arguments)
        elif func is F.linear and self.head is not None and self.head.computes(*args, **kwargs):
            return LazyLogits(*args, **kwargs, head=self.head)
        elif func is torch.arange:
            return waiting.mark_range(args, kwargs)
        return func(*args, **kwargs)

    def _is_over_the_batch(self, func: Callable, prediction: Tensor) -> bool:
        """Whether a loss may be over items of the batch. A penalty of parameters or of their products is not."""
        rows = prediction.shape[0] if prediction.dim() else 1
        return UNREDUCED[func] is not _row_losses or rows <= self.batch.batch_size or not rows % self.batch.batch_size

    def _record(self, func: Callable, arguments: dict[str, Any]) -> Tensor:
        plain, first = None, next(iter(arguments.values()))
        if first.is_leaf and first.requires_grad or not self._is_over_the_batch(func, first):
            return func(**arguments)
        if self.batch.keeps_all and not isinstance(arguments.get("input"), LazyLogits):
            plain = self.batch.if_plain(func(**arguments))
        with torch.set_grad_enabled(torch.is_grad_enabled() and plain is None):
            fields = UNREDUCED[func](func, {**arguments, "reduction": "none"}, arguments["reduction"])
        return self.batch.add(LossCall(**fields, batch_size=self.batch.batch_size, plain=plain))


def mark_losses(losses: Tensor, counts: Tensor | None = None, *, scores: Tensor | None = None) -> Tensor:
    """
    Marks unreduced losses whose mean is taken by hand, so that the mean is over the kept ones. To be called in a
    model's forward pass, or in the `compute_loss` of a trainer:

    ```python
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    focal = mark_losses((1 - torch.exp(-losses)) ** 2 * losses)
    loss = focal.mean()
    ```

    While [`TrimmingTrainer`] trains, only the kept losses get a gradient, multiplied by `counts.sum()` and divided by
    the sum of the kept counts. A mean over all becomes a mean over the kept by that, and a sum one that is scaled up
    to all. Everywhere else the function does nothing. It must be called outside of what is compiled.

    Args:
        losses (`torch.Tensor`): Losses of any shape, e.g. `[B]`, `[B, T]`, or `[B·T]`.
        counts (`torch.Tensor`, *optional*): In the shape of the losses, what each counts for in the mean: the weight
            of its sample if the mean is divided by the sum of the weights, and 0 if it is no item (no label). The
            default is 1 for each.
        scores (`torch.Tensor`, *optional*): In the shape of the losses, what items are ranked by, if not the losses.

    Returns:
        `torch.Tensor`: The same losses.

    Raises:
        `ValueError`: If the shapes differ.
    """
    for name, value in (("counts", counts), ("scores", scores)):
        if value is not None and value.shape != losses.shape:
            raise ValueError(
                f"{name} must have the shape {list(losses.shape)} of the losses, and has {list(value.shape)}."
            )
    batch = _ACTIVE.get()
    if batch is None or torch.compiler.is_compiling() or not batch.is_recording or is_transforming():
        return losses
    if not (losses.requires_grad or batch.is_scoring):
        return losses
    counts = torch.ones_like(losses, requires_grad=False) if counts is None else counts
    plain = batch.if_plain(losses) if batch.keeps_all else None
    call = LossCall(losses, counts, "none", batch.batch_size, scores=scores, plain=plain)
    return batch.add(call).view(losses.shape)


def intercepting_batch() -> "TrimmedBatch | None":
    """The mini-batch whose calls of loss functions are intercepted now."""
    return _ACTIVE.get()


def loss_of(result: Any) -> Tensor:
    """The loss among what `compute_loss` returned: the loss, or a tuple of loss and outputs."""
    return result[0] if isinstance(result, tuple) else result


def with_loss(result: Any, loss: Tensor) -> Any:
    """The same with another loss."""
    return (loss, *result[1:]) if isinstance(result, tuple) else loss
