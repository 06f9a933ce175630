"""
Row-sparse backward. The backward pass starts with a gradient that holds the kept rows only, and each op on it computes
these rows only. Before it starts, the graph is searched for nodes that need an ordinary gradient: these get one.

e.g. losses `[B]`, B = 4, kept 1 and 3: the gradient that arrives is `[2]`, and the losses get a `RowSparseTensor` of
shape `[4]` with that payload. Behind a linear layer it is `[4, C]` with the payload `[2, C]`, and so on.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.graph import Node

from hf_trim.backward import waiting
from hf_trim.backward._torch_internals import (
    BackwardHookFunction,
    CheckpointFunction,
    assert_later,
    current_backward_pass,
    current_node,
    function_of,
    is_batched,
    is_transforming,
    replace_function,
    strided_size,
    wrapped_checkpoint_function,
)
from hf_trim.backward.compiled.graph import accept_row_sparse_gradients, is_compiled_graph
from hf_trim.backward.eager import rules  # noqa: F401 (registers them)
from hf_trim.backward.eager.checkpoint import recompute_kept_rows
from hf_trim.backward.eager.rows import Rows
from hf_trim.backward.eager.saved import COMPUTE_WITH_SAVED, keep_rows_of_saved
from hf_trim.backward.eager.tensor import RowSparseTensor, RowTensor, densify
from hf_trim.backward.settings import current_settings
from hf_trim.backward.tape.entry import find_entry
from hf_trim.backward.tape.tapes import TAPES


DENSE_ABOVE = 0.8  # kept share above which slicing costs about what it saves
_ATEN_NODE = re.compile(r"\w+Backward\d+(_copy)?$|CopyBackwards$|CopySlices$")
# Python Functions whose backward hands its gradients on, or computes with ordinary ops.
_TRANSPARENT_FUNCTIONS = {
    "RegisterPostBackwardFunction",  # FSDP2
    "_DDPSink",
    "PreBackwardFunctionForModule",  # DeepSpeed ZeRO
    "PostBackwardFunctionModule",
    "LinearFunctionForZeroStage3",
}
# Python Functions whose backward is a formula of ordinary ops, which have rules.
_FORMULAS = {
    "transformers.models.bloom.modeling_bloom.GeLUFunction",
    "transformers.models.recurrent_gemma.modeling_recurrent_gemma.SqrtBoundDerivative",
    "transformers.models.sew_d.modeling_sew_d.XDropout",
    "transformers.models.sew_d.modeling_sew_d.XSoftmax",
    "transformers.models.yoso.modeling_yoso.YosoCumulation",
    *(
        f"timm.layers.activations_me.{name}AutoFn"
        for name in ("HardMish", "HardSigmoid", "HardSwish", "Mish", "Swish")
    ),
}
_MOST_NUMBERED = 1 << 20  # entries of a tensor, counted exactly by float32
# Keys in the metadata of a node, which lives longer than one backward pass.
_DENSE = "hf_trim_dense"  # it gets ordinary gradients: the row-sparse one that they were, until it has run
_GIVES_DENSE = "hf_trim_gives_dense"  # it hands ordinary gradients to those that [`_reaches_user`] names


def take_rows_sparse(losses: Tensor, kept: Tensor, dense_above: float = DENSE_ABOVE) -> Tensor:
    """
    The kept losses, with a backward pass that costs only what is kept.

    Args:
        losses (`torch.Tensor`): `[n, ...]` unreduced losses.
        kept (`torch.Tensor`): `[k]` different indices into the first dimension of `losses`, int64, in any order (those
            of `topk`, say).
        dense_above (`float`, *optional*, defaults to 0.8): Kept share above which the backward pass is dense.

    Returns:
        `torch.Tensor`: `[k, ...]` losses, equal to `losses[kept]`; the gradients are those of `losses[kept]` too.

    Raises:
        `ValueError`: If `losses` has no dimension, or `kept` is empty or names a row twice.
    """
    if losses.ndim == 0 or kept.ndim != 1 or not kept.numel():
        raise ValueError(
            f"Expected losses [n, ...] and kept [k], k > 0; got {tuple(losses.shape)}, {tuple(kept.shape)}."
        )
    rows = prepare_rows([losses], kept, losses.shape[0], dense_above)
    return losses.index_select(0, kept) if rows is None else _TakeRows.apply(losses, rows)


def prepare_rows(tensors: Sequence[Tensor], kept: Tensor, batch: int, dense_above: float = DENSE_ABOVE) -> Rows | None:
    """
    Prepares the graph of some tensors for gradients that are zero for all rows but the kept ones, see
    [`row_gradient`].

    Args:
        tensors (`Sequence[torch.Tensor]`): The tensors, with their graphs. Their gradients share the rows, so that
            they can be added up row by row.
        kept (`torch.Tensor`): `[k]` different numbers of rows in any order, int64.
        batch (`int`): Number B of rows.
        dense_above (`float`, *optional*, defaults to 0.8): Kept share above which the backward pass is dense.

    Returns:
        [`~hf_trim.backward.eager.rows.Rows`] or `None`: The rows; `None` where ordinary gradients are better.
    """
    _check_different(kept)
    nodes = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    if not 0 < kept.numel() <= dense_above * batch or len(nodes) < len(tensors) or _needs_ordinary_tensors(*tensors):
        return None
    rows = Rows(kept, batch, may_be_run=not current_settings().tape)
    prepare_backward(nodes, rows)
    return rows


def prepare_backward(nodes: Sequence[Node], rows: Rows) -> None:
    """
    Prepares a graph for row-sparse gradients, see [`prepare_graph`]. Where tapes are used, most of it is left to the
    backward pass: what runs from a tape needs no preparation.

    Args:
        nodes (`Sequence[torch.autograd.graph.Node]`): Where the backward pass begins.
        rows ([`~hf_trim.backward.eager.rows.Rows`]): The kept rows.
    """
    entry = find_entry(nodes, _may_begin_a_tape) if current_settings().tape else None
    prepare_graph(nodes, rows, until=entry)
    if entry is None:
        return
    is_inside = False  # whether the engine runs in the place of the tape, to record it say

    def prehook(grads):
        nonlocal is_inside
        own = [grad for grad in grads if isinstance(grad, RowSparseTensor) and grad.rows is rows]
        if is_inside or not own:
            return None
        node = current_node()  # the hook of a node must not hold it
        prepare, is_inside = partial(prepare_graph, [node], rows), True
        try:
            if len(own) == sum(grad is not None for grad in grads) and TAPES.run(node, grads, rows, prepare):
                return (None,) * len(grads)
            prepare()
        finally:
            is_inside = False
        return None

    entry.register_prehook(prehook)


def _may_begin_a_tape(node: Node) -> bool:
    """Whether a node's formula is ATen's own, and is run as it is."""
    name, module = type(node).__name__, type(node).__module__
    return module == "builtins" and bool(_ATEN_NODE.match(name)) and not _is_prepared(name)


def _is_prepared(name: str) -> bool:
    """Whether nodes of this kind are not run as they are."""
    return name.startswith("AsStrided") or name in COMPUTE_WITH_SAVED


def row_gradient(payload: Tensor, rows: Rows, inner: int = 1) -> Tensor:
    """
    A gradient that is zero for all rows but the kept ones.

    Args:
        payload (`torch.Tensor`): `[k·inner, ...]` gradients of the kept rows.
        rows ([`~hf_trim.backward.eager.rows.Rows`]): The kept rows, as [`prepare_rows`] returned them.
        inner (`int`, *optional*, defaults to 1): Number of entries of a row, e.g. T tokens.

    Returns:
        `torch.Tensor`: Of shape `[B·inner, ...]`; row-sparse unless something needs an ordinary tensor.
    """
    if rows.starts_dense or needs_ordinary_gradients(payload):
        dense = payload.new_zeros(rows.batch, inner, *payload.shape[1:])
        values = payload.reshape(rows.count, inner, *payload.shape[1:])
        return dense.index_add(0, rows.index_on(dense.device), values).reshape(rows.batch * inner, *payload.shape[1:])
    rows.backward_pass = current_backward_pass()
    return RowSparseTensor(payload.resolve_conj().resolve_neg().contiguous(), rows, 0, 1, inner)


def _check_different(kept: Tensor) -> None:
    """Each row must be named once: a payload that names one twice has no sum. On a GPU the host does not wait."""
    ascending = kept.sort().values
    different = (ascending[1:] != ascending[:-1]).all()
    if not waiting.reads_freely(kept.device):
        assert_later(different, "The kept indices must be different.")
    elif not different:
        raise ValueError(f"The kept indices must be different, and are {kept.tolist()}.")


def needs_ordinary_gradients(*tensors: Tensor) -> bool:
    """
    Whether the backward pass under way is for ordinary tensors: it has a graph, is traced, checked for NaN, one of
    many (`is_grads_batched`), or itself differentiated forward.
    """
    return torch.is_grad_enabled() or torch.is_anomaly_enabled() or _needs_ordinary_tensors(*tensors)


def _needs_ordinary_tensors(*tensors: Tensor) -> bool:
    """Whether the backward pass is compiled, or one of many (`is_grads_batched`), or itself differentiated forward."""
    if torch.compiler.is_compiling() or is_transforming():
        return True
    return any(is_batched(x) or unpack_dual(x).tangent is not None for x in tensors)


class _TakeRows(torch.autograd.Function):
    """`losses[kept]`, `[k]`, whose backward makes a row-sparse gradient of `[B]` out of the `[k]` that arrive."""

    @staticmethod
    def forward(ctx, losses, rows):
        ctx.rows = rows
        return losses.index_select(0, rows.index)

    @staticmethod
    def backward(ctx, grad):
        return row_gradient(grad, ctx.rows), None


# ---- nodes that need an ordinary gradient ------------------------------------------------------------------------


def prepare_graph(
    nodes: Iterable[Node | None], rows: Rows, skip_leaves: Collection[Tensor] = (), until: Node | None = None
) -> None:
    """
    Prepares a graph for row-sparse gradients: whatever is not one of ATen's own backward nodes gets ordinary ones,
    checkpoints recompute the kept rows only, and formulas compute with the kept rows of what was saved.

    Args:
        nodes (iterable of `torch.autograd.graph.Node`): Where the backward pass begins.
        rows ([`~hf_trim.backward.eager.rows.Rows`]): The kept rows.
        skip_leaves (collection of `torch.Tensor`): Leaves whose `grad` may become row-sparse.
        until (`torch.autograd.graph.Node`, *optional*): This node, and what is behind it, is left as it is.
    """
    current_settings()  # from here on, a thread of autograd's finds those of this thread
    skip = {id(x) for x in skip_leaves}
    stack = [node for node in nodes if node is not None]
    rows.starts_dense = any(_reaches_user(node, skip) for node in stack)
    seen = {*stack, until}
    stack = [node for node in stack if node is not until]
    while stack:
        node = stack.pop()
        node_type = type(node)
        if node_type.__name__.startswith("AsStrided"):  # its formula writes into zeros of the whole storage
            _densify_gradients(node, counted=False, keeps_gradient=_keeps_gradient(node))
        elif is_compiled_graph(node):
            accept_row_sparse_gradients(node)
        elif node_type.__module__ != "builtins" or not _ATEN_NODE.match(node_type.__name__):
            function = function_of(node)
            if function is CheckpointFunction:
                replace_function(node, _SparseCheckpoint)
            elif function is BackwardHookFunction:
                _densify_gradients(node, counted=False)
            elif function is not None and f"{function.__module__}.{function.__qualname__}" in _FORMULAS:
                keep_rows_of_saved(node)
            elif function is not _SparseCheckpoint and getattr(function, "__name__", "") not in _TRANSPARENT_FUNCTIONS:
                _densify_gradients(node)
        else:
            recompute_kept_rows(node, rows)
            if node_type.__name__ in COMPUTE_WITH_SAVED:
                keep_rows_of_saved(node)
        _give_dense(node, skip)
        for next_node, _ in node.next_functions:
            if next_node is not None and next_node not in seen and type(next_node).__name__ != "AccumulateGrad":
                seen.add(next_node)
                stack.append(next_node)


def _reaches_user(node: Node, skip_leaves: Collection[int]) -> bool:
    """Whether the user gets what reaches a node: it is a leaf, or has the hooks of a module."""
    if type(node).__name__ == "AccumulateGrad":
        return id(node.variable) not in skip_leaves  # type: ignore[attr-defined]
    return function_of(node) is BackwardHookFunction


def _give_dense(node: Node, skip_leaves: Collection[int]) -> None:
    """
    Has a node hand ordinary gradients to those next ones whose gradients the user gets: hooks, and whoever asked
    `torch.autograd.grad` for them, see them before the next node's own hooks do.
    """
    users = {i: x for i, (x, _) in enumerate(node.next_functions) if x is not None and _reaches_user(x, skip_leaves)}
    metadata: Any = node.metadata
    if not users or _GIVES_DENSE in metadata:
        return
    metadata[_GIVES_DENSE] = True

    def posthook(grads, _):
        if not any(isinstance(grads[i], RowTensor) for i in users):
            return None
        for i, user in users.items():
            if isinstance(grads[i], RowSparseTensor) and _DENSE in user.metadata:
                user.metadata[_DENSE][:] = [grads[i]]
        return tuple(densify(grad) if i in users else grad for i, grad in enumerate(grads))

    node.register_hook(posthook)


def _keeps_gradient(node: Node) -> bool:
    """
    Whether a node of `as_strided` returns its gradient as it is: global pooling sets strides so, of images with
    channels last and of texts. It is asked what it makes of numbered entries, on the CPU.
    """
    size = strided_size(node)
    if prod(size) > _MOST_NUMBERED:
        return False
    with torch.no_grad():
        # From 1 on: where the second entry is read twice, its gradient is a sum, and 0 + 1 would be the 1 it has.
        numbers = torch.arange(1, prod(size) + 1, dtype=torch.float32, device="cpu").view(size)
        formula: Any = node
        return torch.equal(formula(numbers), numbers)


def _densify_gradients(node: Node, counted: bool = True, keeps_gradient: bool = False) -> None:
    """
    Gives a node ordinary gradients, and makes what it returns row-sparse again: where it is zero elsewhere, or known
    to be the gradient that arrived.
    """
    metadata: Any = node.metadata
    if _DENSE in metadata:
        return
    name = node.name()
    incoming: list[RowSparseTensor] = []  # the row-sparse gradient that arrived, for the posthook
    metadata[_DENSE] = incoming

    def prehook(grads):
        if not any(isinstance(grad, RowTensor) for grad in grads):
            return None
        incoming[:] = [grad for grad in grads if isinstance(grad, RowSparseTensor)][:1]
        if counted:
            settings = current_settings()
            if settings.strict:
                shapes = [tuple(grad.shape) for grad in grads if grad is not None]
                raise RuntimeError(f"{name} is not an ATen op and takes no row-sparse gradient (shapes {shapes}).")
            settings.fallbacks[name] += 1
        return tuple(densify(grad) for grad in grads)

    def posthook(grads, _):
        if not incoming:
            return None
        sparse = incoming.pop()
        if keeps_gradient:
            return (sparse,)
        return tuple(grad if grad is None else sparse.sparsify(grad) for grad in grads)

    node.register_prehook(prehook)
    node.register_hook(posthook)


class _SparseCheckpoint(CheckpointFunction):
    """Stands in for reentrant checkpointing's backward, which runs a backward pass of its own."""

    @staticmethod
    def backward(ctx, *grads):
        rows = next((grad.rows for grad in grads if isinstance(grad, RowSparseTensor)), None)
        if rows is None:
            return CheckpointFunction.backward(ctx, *grads)

        def run_prepared(function, *inputs):
            outputs = function(*inputs)
            tensors = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(x, Tensor)]
            leaves = [x for x in inputs if isinstance(x, Tensor)]
            prepare_graph([x.grad_fn for x in tensors], rows, skip_leaves=leaves)
            return outputs

        with wrapped_checkpoint_function(ctx, run_prepared):
            return CheckpointFunction.backward(ctx, *grads)
