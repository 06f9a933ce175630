"""
The backward pass of a compiled graph on the kept rows.

`torch.compile` makes one backward graph for all batch sizes if the batch dimension is dynamic. Where a row-sparse
gradient reaches that graph, the tensors that the forward pass saved are sliced to the kept rows, and the graph is
called with their number in the place of the batch size. It is the same code, and nothing is compiled again when p
changes. `proof.py` says which dimensions are sliced, and whether the gradients are those of the whole batch. Where
they are not, the graph runs on the whole batch.

Example: B = 4, T = 5, rows 1 and 3 are kept. A gradient arrives as a row-sparse `[20, C]` (B·T, C) with the payload
`[10, C]`. The saved activation `[20, C]` is sliced to `[10, C]`, and the graph runs with s0 = 2. It returns the
gradient of a weight, `[C, C]`, which is complete, and that of its input, `[10, C]`, which becomes a row-sparse
`[20, C]` again.
"""

import logging
from typing import Any, cast

import torch

from hf_trim.backward._compile_internals import (
    aot_backward,
    aot_backward_is_compiled,
    aot_function,
    aot_outputs_with_gradients,
    free_saved_tensors,
    replace_aot_backward,
)
from hf_trim.backward.compiled.comparison import relative_difference, tolerance
from hf_trim.backward.compiled.errors import GraphRefusedError
from hf_trim.backward.compiled.plan import BackwardCall, InputSlice, Plan, Planner, RunSizes
from hf_trim.backward.compiled.slices import clear_padding, holds_row_numbers, pad_rows, take_rows, to_row_sparse
from hf_trim.backward.compiled.symbols import Values
from hf_trim.backward.compiled.whole_batch import OnWholeBatch
from hf_trim.backward.eager.tensor import RowSparseTensor, RowTensor, densify
from hf_trim.backward.settings import current_settings


logger = logging.getLogger(__name__)
# Keys in the metadata of an autograd node.
_PENDING = "hf_trim_pending"  # the backward call under way
_READY = "hf_trim_ready"  # whether the node was prepared


def is_compiled_graph(node: torch.autograd.graph.Node) -> bool:
    """
    Args:
        node (`torch.autograd.graph.Node`): A node of an autograd graph.

    Returns:
        `bool`: Whether it is the backward pass of a graph that AOTAutograd compiled.
    """
    return aot_function(node) is not None


def accept_row_sparse_gradients(node: torch.autograd.graph.Node) -> None:
    """
    Prepares the backward pass of a compiled graph for row-sparse gradients.

    Args:
        node (`torch.autograd.graph.Node`): A node for which [`is_compiled_graph`] is true.
    """
    metadata = cast(dict, node.metadata)  # torch's types have it as a method
    if _READY in metadata:  # the node lives longer than one backward pass
        return
    metadata[_READY] = True
    function: Any = aot_function(node)
    if "_hf_trim" not in vars(function):
        function._hf_trim = CompiledBackward(function)
    backward = function._hf_trim

    # AOTAutograd's own code takes ordinary tensors only. So the gradients are densified for it, and the row-sparse
    # ones wait in the node's metadata until it calls the graph.
    def prehook(grads):
        node.metadata.pop(_PENDING, None)
        first = next((grad for grad in grads if isinstance(grad, RowTensor)), None)
        if first is None:
            return None
        arriving = tuple(grads[i] for i in backward.outputs_with_gradients if i < len(grads))
        node.metadata[_PENDING] = BackwardCall(first.rows, arriving)
        return tuple(densify(grad) for grad in grads)

    node.register_prehook(prehook)


class CompiledBackward:
    """
    The backward pass of one compiled graph.

    Args:
        function (`type`): AOTAutograd's `torch.autograd.Function`. This object runs its backward graph from now on.
    """

    def __init__(self, function: type):
        self.function, self.run_dense = function, aot_backward(function)
        self.outputs_with_gradients = aot_outputs_with_gradients(function)
        self.planner = Planner(function)
        replace_aot_backward(function, self._run)

    def _run(self, ctx: Any, args: list) -> Any:
        call = ctx.metadata.pop(_PENDING, None)
        if call is None:
            return self.run_dense(ctx, args)
        try:
            plan, values = self.planner.plan(call, args)
            if plan.whole_batch_calls and not aot_backward_is_compiled(self.function):
                return self.run_dense(ctx, args)  # a compiler must not meet the ops in `OnWholeBatch`
            return self._run_on_rows(ctx, args, call, plan, values)
        except GraphRefusedError as error:
            self._refuse(str(error))
        return self.run_dense(ctx, args)

    def _refuse(self, reason: str) -> None:
        settings = current_settings()
        if settings.strict:
            raise RuntimeError(f"A compiled backward graph cannot run on the kept rows: {reason}.")
        if reason not in settings.refused_graphs:
            logger.warning("A compiled backward graph runs on the whole batch, and saves no time: %s.", reason)
        settings.refused_graphs[reason] += 1
        settings.fallbacks[f"a compiled graph ({reason})"] += 1

    def _run_on_rows(self, ctx: Any, args: list, call: BackwardCall, plan: Plan, values: Values) -> list:
        sizes = self.planner.sizes(plan, call.rows, values)
        self._check_inputs(args, call, plan, sizes)
        compare = current_settings().check_compiled and not plan.compared
        all_rows = list(args) if compare or not plan.meets_calls else None
        free_saved_tensors(ctx)  # so that each tensor is freed as soon as its rows are taken
        self._slice_inputs(args, call, plan, sizes, copy=all_rows is not None)
        grads = self._run_sliced(ctx, args, call, plan, sizes)
        if all_rows is not None and not plan.meets_calls:
            args[:] = all_rows
            plan.proof.reason = "an op that has to see the whole batch is not met where the compiled code calls it"
            raise GraphRefusedError(plan.proof.reason)
        grads = [
            grad if layout is None or grad is None else to_row_sparse(grad, call.rows, sizes.row_count, layout)
            for grad, layout in zip(grads, sizes.outputs, strict=True)
        ]
        return self._compare(grads, self.run_dense(ctx, all_rows), plan) if compare and all_rows is not None else grads

    def _run_sliced(self, ctx: Any, args: list, call: BackwardCall, plan: Plan, sizes: RunSizes) -> list:
        """Runs the graph on inputs for the kept rows, with those ops on the whole batch that have to see it."""
        if not plan.whole_batch_calls:
            return self.run_dense(ctx, args)
        with OnWholeBatch(plan.proof.whole_batch_ops, call.rows, sizes.row_count) as ops:
            grads = self.run_dense(ctx, args)
        plan.meets_calls = ops.calls == plan.whole_batch_calls
        return grads

    def _check_inputs(self, args: list, call: BackwardCall, plan: Plan, sizes: RunSizes) -> None:
        """Checks what the proof assumed of the inputs and could not know from their shapes."""
        for position, grad in zip(self.planner.grad_positions, call.grads, strict=True):
            if not isinstance(grad, RowSparseTensor):
                continue
            if sizes.inputs[position].layout != (grad.row_dim, grad.row_outer, grad.row_inner):
                raise GraphRefusedError("a gradient that arrives carries its rows in another place than in the graph")
        # On a GPU the host waits for this answer.
        if not all(is_known or holds_row_numbers(args[i]) for i, is_known in plan.proof.row_index_inputs.items()):
            raise GraphRefusedError("a saved index looks up entries of other rows")

    def _slice_inputs(self, args: list, call: BackwardCall, plan: Plan, sizes: RunSizes, copy: bool) -> None:
        """Replaces the graph's inputs in `args` by those for the kept rows."""
        rows, row_index_inputs = pad_rows(call.rows, sizes.row_count), plan.proof.row_index_inputs
        for position, size in enumerate(sizes.inputs):
            if position in row_index_inputs:
                index = args[position]
                args[position] = torch.arange(sizes.row_count, dtype=index.dtype, device=index.device)
            elif isinstance(size, int):
                args[position] = size
            elif isinstance(size, InputSlice):
                x, args[position] = args[position], None
                args[position] = take_rows(x, rows, *size, copy=copy)
                del x  # else it would live on while the next one is sliced
        if sizes.row_count > call.rows.count:
            for position, grad in zip(self.planner.grad_positions, call.grads, strict=True):
                if isinstance(grad, RowSparseTensor):
                    clear_padding(args[position], call.rows, sizes.row_count, sizes.inputs[position].layout)

    def _compare(self, grads: list, dense: list, plan: Plan) -> list:
        """Compares the first gradients on the kept rows with the dense ones, and returns those to go on with."""
        difference = relative_difference(grads, dense)
        if difference is None:
            return grads  # the next backward pass may have something to compare
        plan.compared = True
        if difference <= tolerance([*self.planner.inputs, *dense]):
            return grads
        plan.proof.reason = "on the kept rows it gave other gradients than on the whole batch"
        logger.error(
            "A compiled backward graph, run on the kept rows, gave other gradients than on the whole batch (relative "
            "difference %.1e). It runs on the whole batch from now on; please report this model.", difference,
        )  # fmt: skip
        self._refuse(plan.proof.reason)
        return dense
