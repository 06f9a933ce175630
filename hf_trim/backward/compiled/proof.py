"""
The proof that a backward graph gives the same gradients on the kept rows alone.

AOTAutograd writes a backward graph for a symbolic batch size. Run on the kept rows of everything that carries rows, it
computes the gradients of the whole batch if each tensor of that run is, op by op,

- the *same* as in the run on the whole batch (weights and their gradients), or
- its *rows*: row r of it depends on row r of the operands alone.

A sum over rows is the same only if what it sums is zero in all other rows, as the gradient of the kept losses is. So
the proof also follows where values are zero. If an op has no rule, nothing is known of its result; if that result
reaches a gradient, the graph is refused. The rules of the ops are in `proof_rules/`.

The graph does not say where a saved tensor of `[B*T, C]` has its rows: its first dimension may be `[B, T]` merged, or
`[T, B]`. It need not say so. A saved tensor is multiplied by gradients, and counts only where these are not zero. So
the proof looks for its rows where the gradients have theirs, and any choice is right that suits all ops.

Example: the backward pass of a linear layer on `[s0, 5, 16]`, with s0 = B and 5 tokens.

| node | shape | rows | zero |
|---|---|---|---|
| `tangents_1`, the gradient that arrives | `[s0, 5, 16]` | dimension 0 | outside of the kept rows |
| `view`, the same as a matrix | `[s0*5, 16]` | dimension 0, inner 5 | outside of the kept rows |
| `permute`, transposed | `[16, s0*5]` | dimension 1, inner 5 | outside of the kept rows |
| `saved`, the layer's input | `[s0*5, 16]` | dimension 0, inner 5: assumed | unknown |
| `mm(permute, saved)`, gradient of the weight | `[16, 16]` | none: a sum over the rows | unknown |

The last sum runs over rows of which those not kept are zero. So 2 kept rows of 4 give the same `[16, 16]`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from operator import getitem
from typing import Any

import sympy
import torch
from torch import SymBool, SymFloat, SymInt, Tensor, fx

from hf_trim.backward._compile_internals import is_range, is_traced, size_expression, traced_value
from hf_trim.backward._torch_internals import OpOverload, is_mutable, is_torch_op, op_arguments, op_name, tree_iter
from hf_trim.backward.compiled.proof_rules.indexing import INDEXING
from hf_trim.backward.compiled.proof_rules.pointwise import pointwise
from hf_trim.backward.compiled.values import Value, Zeros, is_equal, is_integral, values_in
from hf_trim.backward.facts.fact import Fact
from hf_trim.backward.facts.pointwise import is_pointwise
from hf_trim.backward.registry import PROOF, NotRowwiseError, require


# Arguments that may depend on the batch size: sizes of results, which `result` checks, and what the rules look at.
_SIZES = {"size", "input_size", "input_sizes", "length", "N", "start", "end"}
MergedSizes = tuple[sympy.Expr, sympy.Expr]  # what is merged in front of and behind the rows


@dataclass
class Proof:
    """
    Args:
        inputs (`list[Value | None]`): For each input of the graph; `None` for what is no tensor.
        outputs (`list[Value | None]`): For each output; `None` for what is no tensor.
        row_index_inputs (`dict[int, bool]`): Positions of inputs that must hold the numbers of the rows, 0 … B − 1,
            and whether they are known to do so.
        batch (`sympy.Symbol`): The batch size.
        whole_batch_ops (`dict[OpOverload, Fact]`): Ops that have to run on the whole batch.
        reason (`str`): Why the graph cannot run on the kept rows; empty if it can.
    """

    inputs: list
    outputs: list = field(default_factory=list)
    row_index_inputs: dict[int, bool] = field(default_factory=dict)
    batch: sympy.Symbol | None = None
    whole_batch_ops: dict[OpOverload, Fact] = field(default_factory=dict)
    reason: str = ""


def prove(graph: fx.Graph, batch: sympy.Symbol, zeros: dict[fx.Node, Zeros]) -> Proof:
    """
    Args:
        graph (`torch.fx.Graph`): A backward graph with symbolic shapes.
        batch (`sympy.Symbol`): The batch size in it.
        zeros (`dict[torch.fx.Node, Zeros]`): Where the incoming gradients, which are inputs of the graph, are zero:
            `Zeros.OUTSIDE_KEPT` for row-sparse ones, `Zeros.EVERYWHERE` where no gradient arrives.

    Returns:
        [`Proof`]: Where inputs and outputs carry rows, or the reason why there is no proof.
    """
    assumed: dict[fx.Node, MergedSizes] = {}
    while True:
        propagation = Propagation(batch, zeros, assumed)
        proof = propagation.run(graph)
        if not propagation.constraints:
            return proof
        assumed.update(propagation.constraints)  # the proof holds for the old layouts, and is made again


class Propagation:
    """
    One pass through a graph that finds the [`~hf_trim.backward.compiled.values.Value`] of each node. The rules of ops
    are called with it.

    Args:
        batch (`sympy.Symbol`): The batch size.
        zeros (`dict[torch.fx.Node, Zeros]`): Where the incoming gradients are zero.
        assumed (`dict[torch.fx.Node, tuple]`): Assumed `outer` and `inner` of saved tensors. All of the dimension is
            `inner` for those that are not in it.
    """

    def __init__(self, batch: sympy.Symbol, zeros: dict[fx.Node, Zeros], assumed: dict[fx.Node, MergedSizes]):
        self.batch, self.zeros, self.assumed = batch, zeros, assumed
        self.constraints: dict[fx.Node, MergedSizes] = {}  # what ops demand of the layouts of saved tensors
        self.values: dict[fx.Node, Any] = {}
        self.op: Any = None  # the current one
        self.row_index_inputs: set[fx.Node] = set()  # inputs that are used as an index of rows
        self.other_inputs: set[fx.Node] = set()  # inputs that are used in another way
        self.row_index_uses: set[fx.Node] = set()  # inputs that the current op uses as an index of rows
        self.whole_batch_ops: dict[OpOverload, Fact] = {}

    def run(self, graph: fx.Graph) -> Proof:
        """Finds the value of each node, and what follows for the whole graph."""
        inputs = graph.find_nodes(op="placeholder")
        proof = Proof([], batch=self.batch)
        for node in graph.nodes:
            if node.op == "output":
                proof.outputs = [self._output(x) for x in node.args[0]]
                break
            try:
                self.values[node] = self._input(node) if node.op == "placeholder" else self._call(node)
            except NotRowwiseError as error:
                self.values[node] = self._unknown(node, str(error))
            except Exception as error:  # the op is called in a way that its rule does not know
                self.values[node] = self._unknown(node, f"{node.target}: {type(error).__name__}: {error}")
            if isinstance(node.target, OpOverload) and is_mutable(node.target):
                # The changed tensor may have views, whose values would be wrong from here on.
                proof.reason = f"{node.target}: it changes a tensor in place"
            if node.op == "placeholder":
                proof.inputs.append(self.values[node])
        proof.whole_batch_ops = self.whole_batch_ops
        proof.row_index_inputs = {inputs.index(node): is_range(node) for node in self.row_index_inputs}
        proof.reason = proof.reason or self._reason_against(proof)
        return proof

    def _reason_against(self, proof: Proof) -> str:
        outputs = [value for value in proof.outputs if value is not None]
        for value in (*(value for value in proof.inputs if value is not None), *outputs):
            if value.unknown:
                return value.unknown
        if self.row_index_inputs & self.other_inputs:
            return "one of its inputs is used as an index of rows, and in another way too"
        if any(value.row_dim is not None and value.zeros == Zeros.UNKNOWN for value in outputs):
            return "a gradient that it returns may be nonzero outside of the kept rows"
        return ""

    def _unknown(self, node: fx.Node, reason: str) -> Value | tuple:
        reason = reason if node.op == "placeholder" or ":" in reason else f"{node.target}: {reason}"
        traced = traced_value(node)
        if isinstance(traced, (tuple, list)):
            return tuple(Value((), unknown=reason) for _ in traced)
        return Value(_shape(traced), unknown=reason)

    def _output(self, node: Any) -> Value | None:
        return self.values[node] if isinstance(node, fx.Node) and isinstance(traced_value(node), Tensor) else None

    # ---- layouts --------------------------------------------------------------------------------------------------

    def row_dims(self, shape: Iterable) -> list[int]:
        """The dimensions of a shape that carry rows."""
        return [d for d, size in enumerate(shape) if self.batch in size.free_symbols]

    def merged_size(self, size: sympy.Expr) -> sympy.Expr:
        """What is merged with the rows in a dimension of this size: 5 for `5*s0`."""
        factor = sympy.cancel(size / self.batch)
        if self.batch in factor.free_symbols or not is_integral(factor):
            raise NotRowwiseError(f"a dimension of size {size} is no multiple of the batch size {self.batch}")
        return factor

    def _input(self, node: fx.Node) -> Value | None:
        traced = traced_value(node)
        if not isinstance(traced, Tensor):
            return None
        shape, zeros = _shape(traced), self.zeros.get(node, Zeros.UNKNOWN)
        dims = self.row_dims(shape)
        if len(dims) > 1:
            raise NotRowwiseError(f"{node.name} has the batch size {self.batch} in two dimensions")
        if not dims:
            return Value(shape, zeros=Zeros.EVERYWHERE if zeros == Zeros.EVERYWHERE else Zeros.UNKNOWN, source=node)
        outer, inner = self.assumed.get(node, (sympy.Integer(1), self.merged_size(shape[dims[0]])))
        # The rows of a gradient are where they are. Those of a saved tensor may be looked for elsewhere.
        origin = None if node in self.zeros else node
        return Value(shape, dims[0], outer, inner, zeros, source=node, origin=origin)

    def result(
        self,
        shape: Iterable,
        dim: int | None = None,
        like: Value | None = None,
        zeros: Zeros = Zeros.UNKNOWN,
        is_row_index: bool = False,
    ) -> Value:
        """
        The result of an op, checked against its symbolic shape.

        Args:
            shape (`tuple[sympy.Expr, ...]`): Its shape.
            dim (`int`, *optional*): The dimension that carries rows; `None` if it has none.
            like ([`~hf_trim.backward.compiled.values.Value`], *optional*): An operand with the same outer and inner
                size of the rows; `None` if the result is equal all along `dim`.
            zeros ([`~hf_trim.backward.compiled.values.Zeros`]): Where it is zero.
            is_row_index (`bool`): Whether it holds the number of each row.

        Raises:
            [`~hf_trim.backward.registry.NotRowwiseError`]: If the shape has its rows elsewhere.
        """
        shape = tuple(shape)
        if self.row_dims(shape) != ([] if dim is None else [dim]):
            raise NotRowwiseError(f"rows are expected in dimension {dim} of {shape}")
        if dim is None:
            return Value(shape, zeros=Zeros.EVERYWHERE if zeros == Zeros.EVERYWHERE else Zeros.UNKNOWN)
        outer, inner, origin = (None, None, None) if like is None else (like.outer, like.inner, like.origin)
        if outer is not None and not is_equal(outer * inner * self.batch, shape[dim]):
            raise NotRowwiseError(f"a dimension of size {shape[dim]} is expected to be {outer}*{self.batch}*{inner}")
        return Value(shape, dim, outer, inner, zeros, is_row_index, origin=origin)

    def batch_first_result(self, shape: tuple, zeros: Zeros = Zeros.UNKNOWN, is_row_index: bool = False) -> Value:
        """The result of an op, `[B, ...]`: its first dimension is the batch and nothing else."""
        result = self.result(shape, 0, zeros=zeros, is_row_index=is_row_index)
        return replace(result, outer=sympy.Integer(1), inner=sympy.Integer(1))

    def uniform_result(self, shape: tuple, zeros: Zeros) -> Value:
        """A result that is equal all along the dimension that carries rows, if there is one."""
        dims = self.row_dims(shape)
        require(len(dims) <= 1, "its result has the batch size in two dimensions")
        return self.result(shape, dims[0] if dims else None, zeros=zeros)

    def common_layout(self, values: Iterable[Value]) -> Value | None:
        """The operand whose outer and inner size of the rows all of them have."""
        values = [value for value in values if value.outer is not None]
        values.sort(key=self._has_free_layout)  # the free ones follow those that are not
        for value in values[1:]:
            if not (is_equal(value.outer, values[0].outer) and is_equal(value.inner, values[0].inner)):
                reason = "its operands have their rows in different places of a merged dimension"
                self.constrain(value, values[0].outer, values[0].inner, reason)
        return values[0] if values else None

    def _has_free_layout(self, value: Value) -> bool:
        """Whether it has its layout from a saved tensor for which none was assumed yet."""
        return value.origin is not None and value.origin not in self.assumed

    def constrain(self, value: Value, outer: sympy.Expr, inner: sympy.Expr, reason: str) -> None:
        """
        Demands a layout of an operand. If its layout is free, the pass goes on as if it had the demanded one, and is
        repeated with it.

        Raises:
            [`~hf_trim.backward.registry.NotRowwiseError`]: With this reason, if the operand can't have it.
        """
        fits = is_integral(outer) and is_integral(inner) and is_equal(outer * inner, value.outer * value.inner)
        require(self._has_free_layout(value) and fits, reason)
        assert value.origin is not None  # its layout is free
        self.constraints.setdefault(value.origin, (outer, inner))

    def use_as_row_index(self, value: Value) -> None:
        """An op uses an input as an index of rows: its numbers must be 0 … B − 1, which is checked in each call."""
        assert value.source is not None  # the rule has looked
        self.row_index_inputs.add(value.source)
        self.row_index_uses.add(value.source)

    # ---- ops ------------------------------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> Value | tuple | None:
        traced = traced_value(node)
        if node.op == "get_attr":
            require(isinstance(traced, Tensor), "a constant in the graph is not known")
            return Value(_shape(traced))
        operands: tuple[Any, ...] = node.args
        if node.target is getitem and isinstance(self.values.get(operands[0]), tuple):
            return self.values[operands[0]][operands[1]]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._argument)
        if not isinstance(traced, (Tensor, tuple, list)):
            self._check_number(node.target, values_in((args, kwargs)))
            return None
        self.row_index_uses = set()
        try:
            result = self._result_of(node.target, traced, args, kwargs)
            if isinstance(result, Value) and result.source is not None:
                self.row_index_uses.add(result.source)  # it is still the input: what uses it next decides
            return result
        finally:
            sources = {value.source for value in values_in((args, kwargs)) if value.source is not None}
            self.other_inputs |= sources - self.row_index_uses

    def _check_number(self, op: Any, values: Iterable[Value]) -> None:
        """No number may be computed from rows, e.g. by `item`. Sizes are formulas, in which the batch size shows."""
        if isinstance(op, OpOverload) and op_name(op).startswith("sym_"):
            return
        for value in values:
            if value.unknown or value.row_dim is not None:
                raise NotRowwiseError(value.unknown or "it computes a number from rows")

    def _result_of(self, op: Any, traced: Any, args: tuple, kwargs: dict) -> Value | tuple:
        values = list(values_in((args, kwargs)))
        require(isinstance(op, OpOverload), "it has no rule")
        name, is_seeded = op_name(op), torch.Tag.nondeterministic_seeded in op.tags
        rule: Any = PROOF[name] if is_torch_op(op) else None
        if rule is None and not is_seeded and is_pointwise(op):
            rule = pointwise
        self.op = op
        unknown = next((value for value in values if value.unknown), None)
        if unknown is not None and rule is not pointwise:
            raise NotRowwiseError(unknown.unknown)
        shapes = [_shape(x) for x in traced] if isinstance(traced, (tuple, list)) else _shape(traced)
        if not self._has_rows(values, args, kwargs, shapes) and not is_seeded:
            return self._result_without_rows(rule, args, kwargs, shapes, name)
        require(rule is not None, "it has no rule")
        if rule is not pointwise:  # which looks itself: its result may be zero whatever the numbers are
            arguments = (*zip((name for name, _ in op_arguments(op)), args, strict=False), *kwargs.items())
            self.check_no_batch_size([x for argument, x in arguments if argument not in _SIZES])
        result = rule(self, name, shapes, *args, **kwargs)
        if any(value.is_row_index for value in values) and name not in INDEXING:
            # A kept row has another number among the kept rows than in the batch.
            if not (isinstance(result, Value) and (result.is_row_index or result.zeros == Zeros.EVERYWHERE)):
                raise NotRowwiseError("a value depends on the number of a row")
        return tuple(result) if isinstance(result, list) else result

    def _result_without_rows(self, rule, args: tuple, kwargs: dict, shape: Any, name: str) -> Value | tuple:
        """Without rows among its operands, any op is allowed; its rule, if there is one, tells where it is zero."""
        if isinstance(shape, list):
            return tuple(Value(item) for item in shape)
        if rule is None:
            return Value(shape)
        try:
            return rule(self, name, shape, *args, **kwargs)
        except NotRowwiseError:
            return Value(shape)

    def _argument(self, node: fx.Node) -> Any:
        value = self.values.get(node)
        require(value is not None or is_traced(node), "the shape of an operand is unknown")
        return traced_value(node) if value is None else value

    def _has_rows(self, values: list[Value], args: tuple, kwargs: dict, shapes: Any) -> bool:
        """Whether the rows, or their number, play a part in an op."""
        if any(value.row_dim is not None or value.unknown for value in values):
            return True
        shapes = shapes if isinstance(shapes, list) else [shapes]
        return self.has_batch_size((args, kwargs)) or any(self.row_dims(shape) for shape in shapes)

    def has_batch_size(self, args: Any) -> bool:
        """Whether a number among the arguments depends on the batch size."""
        numbers = (x for x in tree_iter(args) if isinstance(x, (SymInt, SymFloat, SymBool)))
        return any(self.batch in size_expression(x).free_symbols for x in numbers)

    def check_no_batch_size(self, *args: Any) -> None:
        """Raises [`~hf_trim.backward.registry.NotRowwiseError`] if a number depends on the batch size."""
        require(not self.has_batch_size(args), "a value depends on the batch size")


def _shape(x: Any) -> tuple:
    return tuple(size_expression(size) for size in x.shape) if isinstance(x, Tensor) else ()
