"""
Steps 2 to 4 (per-item losses, keep decision, trimmed backward) for the head of a language model.

The logits `[tokens, vocabulary]` are by far the largest tensor of a language model. Here they are computed in chunks,
so that never all of them are in memory. First all tokens are scored without a graph. In the backward pass, in chunks
again, the gradients of the layer and of its input are computed for the kept tokens. For example, hidden states
`[8192, 768]` and a weight `[50257, 768]`: the logits `[8192, 50257]` would take 1.6 GB in float32; a chunk of 333
tokens takes 67 MB.

Where most tokens will be kept, say 95 %, the gradients of all are computed with the scores, and those that the other
5 % have for the layer are taken out again: 3 + 2 · 0.05 matrix products of all tokens in place of 1 + 3 · 0.95.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_trim.backward._torch_internals import make_wrapper_subclass, tree_map_only
from hf_trim.backward.eager.rows import Rows
from hf_trim.backward.eager.sparse import row_gradient
from hf_trim.backward.waiting import Later
from hf_trim.trainer.kept import Kept
from hf_trim.trainer.selection import places


MIN_VOCABULARY = 4096  # with a smaller one, all logits at once cost little
CHUNK_ELEMENTS = 1 << 24  # size of the logits of a chunk, unless the layer's weight is far larger
MOST = 4 / 5  # with p above it, 3 + 2 · (1 - p) matrix products are fewer than 1 + 3 · p

# Functions that look at the logits' shape and type only, not at their values.
_Tensor: Any = Tensor  # its type knows the values of these attributes, not their descriptors
_METADATA = {
    _Tensor.shape.__get__, _Tensor.dtype.__get__, _Tensor.device.__get__, _Tensor.ndim.__get__,
    _Tensor.layout.__get__, _Tensor.is_cuda.__get__, _Tensor.requires_grad.__get__, _Tensor.grad_fn.__get__,
    _Tensor.is_leaf.__get__,
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, torch.is_tensor,
    torch.is_floating_point, torch.numel,
}  # fmt: skip
_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.to, Tensor.type}
_ELEMENTWISE = {
    torch.tanh, Tensor.tanh, torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.div, Tensor.div,
    Tensor.__truediv__, torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, torch.sub, Tensor.sub,
    Tensor.__sub__, torch.clamp, Tensor.clamp,
}  # fmt: skip
_RESHAPES = {Tensor.view, Tensor.reshape, torch.reshape}


class LMHead:
    """
    The linear layer that computes a language model's logits.

    Args:
        weight (`torch.Tensor`): The weight of the layer that `model.get_output_embeddings()` returns.
        keep (`float`): The fraction of the tokens that is likely to be kept. Above [`MOST`] the gradients are computed
            together with the scores.
        num_labels ([`~hf_trim.backward.waiting.Later`], *optional*): The number of the mini-batch's labels, for which
            the device was asked before the forward pass. Without, the host waits for the number of tokens with one.
    """

    def __init__(self, weight: Tensor, keep: float, num_labels: Later | None = None):
        self.weight = weight
        self.keep = keep
        self.num_labels = num_labels

    def computes(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
        """
        Args:
            input, weight, bias: Arguments of `torch.nn.functional.linear`.

        Returns:
            `bool`: Whether the layer makes this call.
        """
        return weight is self.weight and type(input) is Tensor


def find_lm_head(model: nn.Module) -> nn.Linear | None:
    """
    The layer whose logits can be computed in chunks.

    Args:
        model (`torch.nn.Module`): A transformers model.

    Returns:
        `torch.nn.Linear` or `None`: The layer; `None` if there is none, the vocabulary is small, or the weight is
        sharded.
    """
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    try:
        module = get_output_embeddings() if get_output_embeddings is not None else None
    except NotImplementedError:
        return None
    weight = getattr(module, "weight", None)
    if type(module) is not nn.Linear or type(weight) is not nn.Parameter or hasattr(weight, "ds_id"):
        return None
    return module if weight.shape[0] >= MIN_VOCABULARY else None


class LazyLogits(Tensor):
    """
    Logits that are not computed yet. Operations that do not change the vocabulary's dimension (shifting, reshaping,
    casting, scaling) are remembered. Any other operation computes the ordinary tensor first.
    """

    __slots__ = ("hidden", "weight", "bias", "steps", "head", "autocast", "computed", "options", "gradients")

    @staticmethod
    def __new__(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None = None, **kwargs):
        dtype = torch.get_autocast_dtype(hidden.device.type) if _autocast(hidden) else hidden.dtype
        shape = (*hidden.shape[:-1], weight.shape[0])
        return make_wrapper_subclass(cls, shape, dtype=kwargs.get("dtype", dtype), device=hidden.device)

    def __init__(self, hidden, weight, bias=None, *, head, steps=(), dtype=None):
        self.hidden, self.weight, self.bias, self.steps, self.head = hidden, weight, bias, steps, head
        # The backward pass computes logits again, and must do so as the forward pass did.
        self.autocast = torch.get_autocast_dtype(hidden.device.type) if _autocast(hidden) else None
        self.computed = self.gradients = self.options = None

    def like(self, hidden: Tensor | None = None, step: tuple | None = None, dtype=None) -> LazyLogits:
        """The same logits for other tokens, or after one more operation."""
        hidden = self.hidden if hidden is None else hidden
        steps = self.steps if step is None else (*self.steps, step)
        dtype = self.dtype if dtype is None else dtype
        return LazyLogits(hidden, self.weight, self.bias, head=self.head, steps=steps, dtype=dtype)

    def materialize(self) -> Tensor:
        """The ordinary tensor, with its graph."""
        if self.computed is not None:
            return self.computed
        logits = _run(self.steps, F.linear(self.hidden, self.weight, self.bias))
        if torch.is_grad_enabled():
            self.computed = logits
        return logits

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        if args and isinstance(args[0], LazyLogits) and args[0].computed is None:
            lazy = _remember(func, args[0], args[1:], kwargs)
            if lazy is not None:
                return lazy
        args, kwargs = tree_map_only(LazyLogits, LazyLogits.materialize, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        args, kwargs = tree_map_only(LazyLogits, LazyLogits.materialize, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **kwargs):
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    def can_score(self, target: Tensor) -> bool:
        """Whether `[N]` targets are classes of these `[N, V]` logits, which are not computed yet."""
        return self.computed is None and self.ndim == 2 and target.ndim == 1 and not target.is_floating_point()

    # ---- losses ---------------------------------------------------------------------------------------------------

    def score(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        **kwargs,
    ) -> Tensor:
        """
        Compute all losses, without a graph.

        Args:
            target (`torch.Tensor`): `[N]` classes, for logits `[N, V]`.
            weight, ignore_index, label_smoothing: Arguments of `torch.nn.functional.cross_entropy`.
            kwargs: Its other arguments, which make no difference here.

        Returns:
            `torch.Tensor`: `[N]` losses in float32 at least; zero where there is no label.
        """
        self.options = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
        self.options["target"] = target
        valid = target != ignore_index
        labelled = places(valid, self.most_labels if self._is_bounded else None)
        counts = valid[labelled] if self._is_bounded else None
        if self.head.keep > MOST and torch.is_grad_enabled():
            losses, *gradients = self._compute(labelled, True, counts)
            self.gradients = (labelled, losses.isfinite().all(), gradients)
        else:
            losses, *_ = self._compute(labelled, False, counts)
        return losses.new_zeros(len(target)).index_copy(0, labelled, losses)

    @property
    def _is_bounded(self) -> bool:
        return self.head.num_labels is not None

    @property
    def most_labels(self) -> int:
        """How many tokens can have a label, as far as the host knows."""
        number, size = self.head.num_labels, self.shape[:-1].numel()
        return size if number is None else min(size, int(number.read()))

    def attach(self, value: Tensor, choose: Callable[[Tensor], Kept]) -> Tensor:
        """
        Give a graph to a value that was computed from the losses. Only the gradients of the kept tokens are computed,
        in the backward pass.

        Args:
            value (`torch.Tensor`): A scalar.
            choose (`Callable`): Called in the backward pass with the gradient of the value. It returns what is kept,
                with the gradient of each kept loss, a scalar, as the factor.

        Returns:
            `torch.Tensor`: The scalar, with the layer and its input as its graph.
        """
        return _KeptLosses.apply(self.hidden, self.weight, self.bias, value, self, choose)

    def kept_gradients(self, kept: Tensor, is_kept: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
        """The labelled ones of the kept tokens; the gradients of the sum of their losses for input, weight, bias."""
        counts = self.options["target"][kept] != self.options["ignore_index"]
        counts = counts if is_kept is None else counts & is_kept
        ready, self.gradients = self.gradients, None  # they will be scaled in place
        # Which ones are left out is worth a wait: most are ready.
        is_bounded = self._is_bounded and (ready is None or self.head.keep == 1)
        found = places(counts, self.most_labels if is_bounded else None)
        kept, counts = kept[found], counts[found] if is_bounded else None
        if ready is not None:
            labelled, is_finite, gradients = ready
            if len(labelled) == len(kept):
                return kept, gradients
            if not is_bounded and is_finite:  # an infinite loss spoils the sums over all tokens
                has_label = self.options["target"] != self.options["ignore_index"]
                others = places(has_label.index_fill(0, kept, False), None)
                if len(others) < len(kept):
                    d_hidden, *sums = gradients
                    _, _, *sums = self._compute(others, True, None, less=sums)
                    return kept, [d_hidden[torch.searchsorted(labelled, kept)], *sums]
        _, *gradients = self._compute(kept, True, counts)
        return kept, gradients

    @torch.no_grad()
    def _compute(self, tokens: Tensor, with_gradients: bool, counts: Tensor | None, less: list | None = None):
        """
        The losses of some tokens, and the gradients of their sum for the hidden states, the weight and the bias. Those
        whose `counts` are false have no loss and no gradient. If there are gradients of the weight and the bias for
        more tokens, those of these ones are taken out (`less`).
        """
        hidden, target = self.hidden.detach(), self.options["target"]
        if counts is not None:  # for the others any class will do
            target = target.where(target != self.options["ignore_index"], 0)
        weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
        if (dtype := self.autocast) is not None:
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        losses = torch.zeros(len(tokens), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
        d_hidden = d_weight = d_bias = None
        sign = 1 if less is None else -1
        if less is not None:
            d_weight, d_bias = less
        elif with_gradients:
            d_hidden = hidden.new_zeros(len(tokens), hidden.shape[1])
            d_weight = torch.zeros_like(self.weight) if self.weight.requires_grad else None
            d_bias = torch.zeros_like(self.bias) if bias is not None and self.bias.requires_grad else None
        size = max(1, CHUNK_ELEMENTS // weight.shape[0], weight.shape[1] // 4)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(tokens), size):
                part, chunk = slice(start, start + size), tokens[start : start + size]
                inputs = hidden.index_select(0, chunk)
                if counts is not None:  # the hidden states of padding need not be finite
                    inputs = inputs.where(counts[part, None], 0)
                logits = F.linear(inputs, weight, bias)
                losses[part], d_logits = self._losses(logits, target.index_select(0, chunk), with_gradients)
                del logits
                if counts is not None:
                    losses[part].mul_(counts[part])
                if d_logits is None:  # no gradients are asked for
                    continue
                d_logits = d_logits.to(inputs.dtype)
                if d_hidden is not None:
                    torch.mm(d_logits, weight, out=d_hidden[part])
                    if counts is not None:
                        d_hidden[part].mul_(counts[part, None])
                if d_weight is not None:
                    if d_weight.dtype == inputs.dtype:
                        d_weight.addmm_(d_logits.t(), inputs, alpha=sign)
                    else:
                        d_weight.add_(d_logits.t() @ inputs, alpha=sign)
                if d_bias is not None:
                    sums = d_logits.sum(0) if counts is None else counts[part].to(d_logits) @ d_logits
                    d_bias.add_(sums, alpha=sign)
        return losses, d_hidden, d_weight, d_bias

    def _losses(self, logits: Tensor, target: Tensor, with_gradients: bool) -> tuple[Tensor, Tensor | None]:
        """The losses of a chunk, and the gradient of their sum for the logits as the layer returns them."""
        options = {**self.options, "target": target, "reduction": "none"}
        is_plain = options["weight"] is None and not options["label_smoothing"]
        if is_plain and all(func in _CASTS for func, *_ in self.steps):
            scores = F.log_softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))
            losses = -scores.gather(1, target[:, None]).squeeze(1)
            if not with_gradients:
                return losses, None
            minus_one = scores.new_full((len(target), 1), -1.0)
            return losses, scores.exp_().scatter_add_(1, target[:, None], minus_one)  # softmax minus one-hot
        with torch.set_grad_enabled(with_gradients):
            logits.requires_grad_(with_gradients)
            scores = _run(self.steps, logits)
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            losses = F.cross_entropy(scores, **options)
            return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0] if with_gradients else None


class _KeptLosses(torch.autograd.Function):
    """The graph of a value computed from the losses: its backward pass computes the gradients of the kept tokens."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, value, logits, choose):
        ctx.logits, ctx.choose, ctx.shape = logits, choose, hidden.shape
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tokens, factor, rows, is_kept = ctx.choose(grad)
        tokens, gradients = ctx.logits.kept_gradients(tokens, is_kept)
        d_hidden, d_weight, d_bias = (None if x is None else x.mul_(factor) for x in gradients)
        d_hidden = _scatter(d_hidden, tokens, rows, ctx.shape) if ctx.needs_input_grad[0] else None
        return d_hidden, d_weight, d_bias, None, None, None


def _scatter(values: Tensor, tokens: Tensor, rows: Rows | None, shape: torch.Size) -> Tensor:
    """`[k, H]` gradients of some tokens → the gradient `[N, H]` of all tokens, row-sparse if `rows` are given."""
    if rows is None:
        return values.new_zeros(shape).index_copy(0, tokens, values)
    length = shape[0] // rows.batch
    # The index of a token among the tokens of the kept samples: with samples 0 and 2 of 3 tokens each, 7 becomes 4.
    index = torch.searchsorted(rows.index, tokens // length) * length + tokens % length
    payload = values.new_zeros(rows.count * length, shape[1]).index_copy(0, index, values)
    return row_gradient(payload, rows, length)


def _autocast(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type) and tensor.dtype != torch.float64


def _run(steps: tuple, logits: Tensor) -> Tensor:
    for func, args, kwargs in steps:
        logits = func(logits, *args, **kwargs)
    return logits


def _remember(func, lazy: LazyLogits, args: tuple, kwargs: dict) -> LazyLogits | None:
    """The logits after an operation that is remembered; `None` if it must be run now."""
    vocabulary = lazy.shape[-1]
    if func is Tensor.contiguous:
        return lazy
    if func in _RESHAPES and not kwargs:
        *shape, last = args[0] if isinstance(args[0], (tuple, list)) else args
        if -1 in shape and last == vocabulary or prod(shape) * vocabulary == lazy.numel():
            return lazy.like(lazy.hidden.reshape(*shape, lazy.hidden.shape[-1]))
        return None
    if func is Tensor.flatten and len(args) == 2 and args[1] in (-2, lazy.ndim - 2):
        return lazy.like(lazy.hidden.flatten(*args))
    if func is Tensor.__getitem__:
        index = list(args[0]) if isinstance(args[0], tuple) else [args[0]]
        if not all(x is Ellipsis or isinstance(x, (int, slice)) for x in index):
            return None
        # Make the index as long as the tensor has dimensions: [..., :-1, :] becomes [:, :-1, :].
        num_dims = sum(x is not Ellipsis for x in index)
        place = index.index(Ellipsis) if Ellipsis in index else len(index)
        index[place : place + 1] = [slice(None)] * (lazy.ndim - num_dims)
        return lazy.like(lazy.hidden[tuple(index)]) if index[-1] == slice(None) else None
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if func in _CASTS:
        if tensors:
            return None
        dtype = func(torch.empty(0, dtype=lazy.dtype), *args, **kwargs).dtype
        return lazy.like(step=(func, args, kwargs), dtype=dtype)
    if func in _ELEMENTWISE and all(
        not isinstance(x, LazyLogits) and not x.requires_grad and x.numel() in (1, x.shape[-1]) and x.ndim <= lazy.ndim
        for x in tensors
    ):
        # Such tensors are broadcast over the tokens, which have a single dimension in a chunk.
        args = tree_map_only(Tensor, lambda x: x.flatten() if x.numel() > 1 else x.reshape(()), args)
        return lazy.like(step=(func, args, kwargs))
    return None
