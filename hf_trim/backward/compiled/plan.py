"""
What is sliced when a compiled backward graph runs on the kept rows.

Example: a linear layer was traced for `[s0*5, 16]` (B·T, C), and B = 4, of which 2 rows are kept.

| input | whole batch | plan | 2 kept rows |
|---|---|---|---|
| size s0 | 4 | the number of rows | 2 |
| saved activation `[s0*5, 16]` | `[20, 16]` | dimension 0, outer 1, inner 5 | `[10, 16]` |
| weight `[16, 16]` | `[16, 16]` | left as it is | `[16, 16]` |
| gradient `[s0*5, 16]` | row-sparse | its payload | `[10, 16]` |

A plan is made once for each combination of gradients that arrive (row-sparse along some dimension, dense, none), and
its numbers once for each combination of sizes.
"""

from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import sympy
from torch import SymInt, Tensor, fx

from hf_trim.backward._compile_internals import (
    aot_backward_graph,
    aot_backward_inputs,
    aot_gradient_inputs,
    is_traced,
    size_expression,
    traced_value,
)
from hf_trim.backward._torch_internals import OpOverload
from hf_trim.backward.compiled.errors import GraphRefusedError
from hf_trim.backward.compiled.proof import Proof, prove
from hf_trim.backward.compiled.slices import RowLayout
from hf_trim.backward.compiled.symbols import Values, evaluate, smallest_allowed_count, symbol_places
from hf_trim.backward.compiled.values import Value, Zeros
from hf_trim.backward.compiled.whole_batch import num_calls
from hf_trim.backward.eager.tensor import Rows, RowSparseTensor


class BackwardCall(NamedTuple):
    """
    One backward pass through a compiled graph.

    Args:
        rows ([`~hf_trim.backward.eager.rows.Rows`]): The kept rows.
        grads (`tuple`): What arrives for each output that the graph has a gradient for: a tensor or `None`.
    """

    rows: Rows
    grads: tuple


class InputSlice(NamedTuple):
    """
    The rows of an input.

    Args:
        layout (`tuple[int, int, int]`): Dimension, outer and inner size of the rows in the input.
        shape (`list[int]`): The shape of the kept rows.
        strides (`list[int]`): Their strides.
        orders (`tuple[list[int], list[int]]` or `None`): The order of the dimensions in which these strides are
            contiguous, and the one back, if the rows are the same in it: one lookup takes them. `None` if it is not as
            simple.
    """

    layout: RowLayout
    shape: list[int]
    strides: list[int]
    orders: tuple[list[int], list[int]] | None


class RunSizes(NamedTuple):
    """
    The numbers of one run.

    Args:
        row_count (`int`): Number of rows that the graph runs on, padded ones among them.
        inputs (`list[int | InputSlice | None]`): The value of a size, what is taken of a tensor, or `None` for what
            stays as it is.
        outputs (`list[tuple[int, int, int] | None]`): Where an output carries rows; `None` if it carries none.
    """

    row_count: int
    inputs: list
    outputs: list


@dataclass
class Plan:
    """
    What is sliced for a combination of gradients that arrive.

    Args:
        proof ([`~hf_trim.backward.compiled.proof.Proof`]): Where the rows are, or why the graph can't run on them.
        whole_batch_calls (`dict[OpOverload, int]`): How often the graph calls ops that have to see the whole batch.
        meets_calls (`bool`): Whether all of these calls were met when the graph ran.
        compared (`bool`): Whether its gradients were compared with the dense ones.
        sizes (`dict`): The number of kept rows and the values of all symbols → [`RunSizes`].
    """

    proof: Proof
    whole_batch_calls: dict[OpOverload, int] = field(default_factory=dict)
    meets_calls: bool = False
    compared: bool = False
    sizes: dict[tuple, RunSizes] = field(default_factory=dict)


class Planner:
    """
    The plans for one compiled backward graph.

    Args:
        function (`type`): AOTAutograd's `torch.autograd.Function`.
    """

    def __init__(self, function: type):
        self.plans: dict[tuple, Plan] = {}
        self.graph = aot_backward_graph(function)
        self.nodes, self.inputs, self.grad_positions = [], [], []
        if self.graph is not None:
            self.nodes = self.graph.find_nodes(op="placeholder")
            self.inputs = aot_backward_inputs(function, self.graph)
            self.grad_positions = aot_gradient_inputs(self.graph)
        self.is_known = self.graph is not None and all(is_traced(node) for node in self.nodes)
        self.places = symbol_places(self.inputs)

    def plan(self, call: BackwardCall, args: list) -> tuple[Plan, Values]:
        """
        Args:
            call ([`BackwardCall`]): The kept rows, and the gradients that arrive.
            args (`list`): The inputs of the graph, for the whole batch.

        Returns:
            `tuple[Plan, dict]`: The plan for these gradients, and the values of the graph's symbols.

        Raises:
            [`~hf_trim.backward.compiled.errors.GraphRefusedError`]: If the graph must run on the whole batch.
        """
        if not self.is_known:
            raise GraphRefusedError(
                "its backward graph is not available, since it came from AOTAutograd's cache (backend='hf_trim' "
                "compiles without that cache)"
            )
        if len(args) != len(self.nodes):
            raise GraphRefusedError("it is called with inputs that are not in its graph")
        values = {
            symbol: int(args[position] if dim is None else args[position].shape[dim])
            for symbol, (position, dim) in self.places.items()
        }
        kinds = tuple(_kind(grad, call.rows) for grad in call.grads)
        if kinds not in self.plans:
            proof = self._prove(call, values)
            calls = num_calls(self.graph, proof.whole_batch_ops) if self.graph is not None else {}
            self.plans[kinds] = Plan(proof, calls, meets_calls=not calls)
        plan = self.plans[kinds]
        if plan.proof.reason:
            raise GraphRefusedError(plan.proof.reason)
        if values[plan.proof.batch] != call.rows.batch:
            raise GraphRefusedError(
                "the batch size was equal to another size when the graph was first analysed, and was mistaken for it"
            )
        return plan, values

    def sizes(self, plan: Plan, rows: Rows, values: Values) -> RunSizes:
        """
        Args:
            plan ([`Plan`]): What is sliced.
            rows ([`~hf_trim.backward.eager.rows.Rows`]): The kept rows.
            values (`dict[sympy.Symbol, int]`): The values of the graph's symbols for the whole batch.

        Returns:
            [`RunSizes`]: The numbers of the run on these rows.

        Raises:
            [`~hf_trim.backward.compiled.errors.GraphRefusedError`]: If the graph was not compiled for as few rows.
        """
        key = (rows.count, *values.values())
        if key not in plan.sizes:
            batch = plan.proof.batch
            count = smallest_allowed_count(self.inputs, batch, values, rows)
            kept = {**values, batch: count}
            pairs = zip(self.inputs, plan.proof.inputs, strict=True)
            inputs = [_input_slice(traced, value, kept) for traced, value in pairs]
            outputs = [None if value is None else _layout(value, kept, batch) for value in plan.proof.outputs]
            plan.sizes[key] = RunSizes(count, inputs, outputs)
        return plan.sizes[key]

    def _prove(self, call: BackwardCall, values: Values) -> Proof:
        if len(self.grad_positions) != len(call.grads):
            return Proof([], reason="it is not known which of its inputs are gradients")
        zeros, candidates = {}, []
        for position, grad in zip(self.grad_positions, call.grads, strict=True):
            node = self.nodes[position]
            zeros[node] = Zeros.EVERYWHERE if grad is None else Zeros.UNKNOWN
            if isinstance(grad, RowSparseTensor):
                if grad.rows is not call.rows:
                    return Proof([], reason="the gradients that arrive are of different rows")
                zeros[node] = Zeros.OUTSIDE_KEPT
                candidates.append(_possible_batch_symbols(node, grad, values))
        symbols = [symbol for symbol in candidates[0] if all(symbol in symbols for symbols in candidates)]
        if not symbols:
            return Proof([], reason="it was compiled for one batch size only (dynamic=True compiles for all)")
        assert self.graph is not None  # `plan` refuses where there is none
        proofs = [prove(self.graph, symbol, zeros) for symbol in symbols]
        return next((proof for proof in proofs if not proof.reason), proofs[0])


def _kind(grad: Tensor | None, rows: Rows) -> str:
    if isinstance(grad, RowSparseTensor):
        return f"rows along {grad.row_dim}" if grad.rows is rows else "other rows"
    return "none" if grad is None else "dense"


def _possible_batch_symbols(node: fx.Node, grad: RowSparseTensor, values: Values) -> list[sympy.Symbol]:
    """The symbols that may be the batch size, by the shape of a gradient and where it carries rows."""
    size = size_expression(traced_value(node).shape[grad.row_dim])
    merged = grad.row_outer * grad.row_inner
    return [
        symbol
        for symbol in size.free_symbols
        if values.get(symbol) == grad.rows.batch and evaluate(size / symbol, values) == merged
    ]


def _input_slice(traced: Any, value: Value | None, values: Values) -> int | InputSlice | None:
    if isinstance(traced, SymInt):
        return evaluate(size_expression(traced), values)
    if value is None or value.row_dim is None:
        return None
    layout = _, outer, _ = value.row_dim, evaluate(value.outer, values), evaluate(value.inner, values)
    shape = [evaluate(size, values) for size in value.shape]
    strides = [evaluate(size_expression(stride), values) for stride in traced.stride()]
    order = sorted(range(len(shape)), key=lambda d: -strides[d])
    is_contiguous = all(
        shape[d] == 1 or strides[d] == prod(shape[e] for e in order[i + 1 :]) for i, d in enumerate(order)
    )
    orders = order, sorted(range(len(shape)), key=order.__getitem__)
    return InputSlice(layout, shape, strides, orders if is_contiguous and outer == 1 else None)


def _layout(value: Value, values: Values, batch: sympy.Symbol) -> RowLayout | None:
    if value.row_dim is None:
        return None
    if value.outer is None:  # equal all along the dimension: the rows may be anywhere in it
        return value.row_dim, 1, evaluate(value.shape[value.row_dim] / batch, values)
    return value.row_dim, evaluate(value.outer, values), evaluate(value.inner, values)
