"""
Which dimension of each tensor of a backward graph carries the rows of the batch, and the proof that no op mixes them.

AOTAutograd writes a backward graph for a symbolic batch size. Run on the kept rows of everything that carries rows, it
computes the gradients of the whole batch if, op by op, each tensor of that run is

- the *same* as in the run on the whole batch (weights and their gradients), or
- its *rows*: row r of it depends on row r of the operands alone.

A sum over rows is the same only if what it sums is zero in all other rows, as the gradient of the kept ones is. So
each value has a degree of `zero` as well. An op that no rule here understands leaves a value of which nothing is
known; if it reaches a gradient, the graph is refused. The rules of the ops are in `proof_rules.py`.

Where the rows of a saved tensor of `[B * T, C]` are is not written in the graph: `[B, T]` may be merged there, or
`[T, B]`. It need not be. What is multiplied by a gradient counts only where that is not zero, so the rows are looked
for where the gradient's are, and any choice is right that suits all ops.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import sympy
import torch
from torch import SymBool, SymFloat, SymInt, Tensor, fx
from torch.utils._pytree import tree_iter

from hf_trim.backward.eager.rules.pointwise import POINTWISE
from hf_trim.backward.registry import PROOF, implements


NOWHERE, ELSEWHERE, EVERYWHERE = 0, 1, 2  # where a value is zero: it may be none, in all rows but the kept, in all
_SYMBOLIC = (SymInt, SymFloat, SymBool)
INDEXING = ("index", "_unsafe_index", "index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate")


class RowsMixedError(Exception):
    """The rows of an op's result are not known to be independent."""


@dataclass(frozen=True)
class Value:
    """
    What is known of a tensor in a backward graph.

    Args:
        shape (`tuple[sympy.Expr, ...]`): Its symbolic shape.
        dim (`int`, *optional*): The dimension that carries rows; `None` if it is the same for any rows.
        outer, inner (`sympy.Expr`, *optional*): Sizes of what is merged in front of and behind the rows in that
            dimension; `None` if all along it is equal, and any will do.
        zero (`int`): `NOWHERE`, `ELSEWHERE` (in rows that are not kept), `EVERYWHERE`.
        numbers (`bool`): Whether it holds the number of each row.
        source (`torch.fx.Node`, *optional*): The input of the graph that it is, but for dimensions of size 1.
        origin (`torch.fx.Node`, *optional*): The saved tensor that it has its `outer` and `inner` from.
        unknown (`str`): Why nothing is known.
    """

    shape: tuple
    dim: int | None = None
    outer: Any = None
    inner: Any = None
    zero: int = NOWHERE
    numbers: bool = False
    source: fx.Node | None = None
    origin: fx.Node | None = None
    unknown: str = ""


@dataclass
class Proof:
    """
    Args:
        inputs (`list[Value | None]`): For each input of the graph; `None` for what is no tensor.
        outputs (`list[Value | None]`): For each output; `None` for what is no tensor.
        row_numbers (`set[int]`): Positions of inputs that must hold the numbers of the rows, 0 … B − 1.
        batch (`sympy.Symbol`): The batch size.
        reason (`str`): Why the graph cannot run on the kept rows; empty if it can.
    """

    inputs: list
    outputs: list = field(default_factory=list)
    row_numbers: set[int] = field(default_factory=set)
    batch: sympy.Symbol | None = None
    reason: str = ""


def expression(size: Any) -> sympy.Expr:
    """
    Args:
        size (`int` or `torch.SymInt`): A size in a graph.

    Returns:
        `sympy.Expr`: The same as an expression.
    """
    return size.node.expr if isinstance(size, SymInt) else sympy.Integer(size)


def prove(graph: fx.Graph, batch: sympy.Symbol, tangents: dict[fx.Node, int]) -> Proof:
    """
    Args:
        graph (`torch.fx.Graph`): A backward graph with symbolic shapes in `meta["val"]`.
        batch (`sympy.Symbol`): The batch size in it.
        tangents (`dict[torch.fx.Node, int]`): Where the gradients among the inputs are zero: `ELSEWHERE`, or
            `EVERYWHERE` (no gradient arrives).

    Returns:
        [`Proof`]: Layouts of inputs and outputs, or the reason why there is no proof.
    """
    placed: dict[fx.Node, tuple] = {}
    while True:
        walk = Walk(batch, tangents, placed)
        proof = walk.over(graph)
        if not walk.wishes:
            return proof
        placed.update(walk.wishes)  # what was found with other places counts for nothing


class Walk:
    """
    What is known of each value of a graph, as far as it was followed; rules are called with it.

    Args:
        batch (`sympy.Symbol`): The batch size.
        tangents (`dict[torch.fx.Node, int]`): Where the gradients among the inputs are zero.
        placed (`dict[torch.fx.Node, tuple]`): `outer` and `inner` of saved tensors; of others all is `inner`.
    """

    def __init__(self, batch: sympy.Symbol, tangents: dict[fx.Node, int], placed: dict[fx.Node, tuple]):
        self.batch, self.tangents, self.placed = batch, tangents, placed
        self.wishes: dict[fx.Node, tuple] = {}  # where ops would have the rows of saved tensors
        self.known: dict[fx.Node, Any] = {}
        self.numbers: set[fx.Node] = set()  # inputs taken for row numbers
        self.plain: set[fx.Node] = set()  # inputs that something reads in another way
        self.taken: set[fx.Node] = set()  # inputs that the op at hand takes for row numbers

    def over(self, graph: fx.Graph) -> Proof:
        inputs = graph.find_nodes(op="placeholder")
        proof = Proof([], batch=self.batch)
        for node in graph.nodes:
            if node.op == "output":
                outputs = [self._output(each) for each in node.args[0]]
                break
            try:
                self.known[node] = self._input(node) if node.op == "placeholder" else self._call(node)
            except RowsMixedError as reason:
                self.known[node] = self._unknown(node, str(reason))
            except Exception as error:  # an op that is called in a way that its rule does not know
                self.known[node] = self._unknown(node, f"{node.target}: {type(error).__name__}: {error}")
            if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
                # what it changes may be known by another name
                proof.reason = f"{node.target} changes a tensor in place"
            if node.op == "placeholder":
                proof.inputs.append(self.known[node])
        proof.outputs = outputs
        proof.row_numbers = {inputs.index(node) for node in self.numbers}
        unknown = [value.unknown for value in (*proof.inputs, *outputs) if value is not None and value.unknown]
        if proof.reason:
            return proof
        if unknown:
            proof.reason = unknown[0]
        elif self.numbers & self.plain:
            proof.reason = "an input holds row numbers, and is read in other ways, too"
        elif any(value is not None and value.dim is not None and not value.zero for value in outputs):
            proof.reason = "the gradient of an input is not known to be zero outside of the kept rows"
        return proof

    def _unknown(self, node: fx.Node, reason: str):
        reason = reason if node.op == "placeholder" or ":" in reason else f"{node.target}: {reason}"
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            return tuple(Value((), unknown=reason) for _ in value)
        return Value(self._shape(value), unknown=reason)

    def _output(self, node: Any) -> Value | None:
        return self.known[node] if isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor) else None

    # ---- layouts --------------------------------------------------------------------------------------------------

    def _shape(self, tensor: Any) -> tuple:
        return tuple(expression(size) for size in tensor.shape) if isinstance(tensor, Tensor) else ()

    def rows_in(self, shape: Iterable) -> list[int]:
        return [d for d, size in enumerate(shape) if self.batch in size.free_symbols]

    def merged(self, size: sympy.Expr) -> sympy.Expr:
        """What is merged with the rows in a dimension of this size."""
        factor = sympy.cancel(size / self.batch)
        if self.batch in factor.free_symbols or not is_whole(factor):
            raise RowsMixedError(f"a dimension of size {size} is no multiple of the batch size {self.batch}")
        return factor

    def _input(self, node: fx.Node) -> Value | None:
        tensor = node.meta.get("val")
        if not isinstance(tensor, Tensor):
            return None
        shape, zero = self._shape(tensor), self.tangents.get(node, NOWHERE)
        rows = self.rows_in(shape)
        if len(rows) > 1:
            raise RowsMixedError(f"{node.name} has the batch size {self.batch} in two dimensions")
        if not rows:
            return Value(shape, zero=EVERYWHERE if zero == EVERYWHERE else NOWHERE, source=node)
        outer, inner = self.placed.get(node, (sympy.Integer(1), self.merged(shape[rows[0]])))
        origin = None if node in self.tangents else node
        return Value(shape, rows[0], outer, inner, zero, source=node, origin=origin)

    def result(self, shape, dim=None, like: Value | None = None, zero: int = NOWHERE, numbers: bool = False) -> Value:
        """A result with rows in `dim`, laid out as those of `like`; checked against its symbolic shape."""
        shape = tuple(shape)
        rows = self.rows_in(shape)
        if rows != ([] if dim is None else [dim]):
            raise RowsMixedError(f"rows are expected in dimension {dim} of {shape}")
        if dim is None:
            return Value(shape, zero=EVERYWHERE if zero == EVERYWHERE else NOWHERE)
        outer, inner, origin = (None, None, None) if like is None else (like.outer, like.inner, like.origin)
        if outer is not None and not equal(outer * inner * self.batch, shape[dim]):
            raise RowsMixedError(f"{shape[dim]} rows are not {outer}*{self.batch}*{inner}")
        return Value(shape, dim, outer, inner, zero, numbers, origin=origin)

    def uniform(self, shape: tuple, zero: int) -> Value:
        """A result that is equal all along the dimension that carries rows, if there is one."""
        rows = self.rows_in(shape)
        if len(rows) > 1:
            raise RowsMixedError("rows meet rows")
        return self.result(shape, rows[0] if rows else None, zero=zero)

    def layout(self, values: Iterable[Value]) -> Value | None:
        """The one whose layout of rows all of them have."""
        laid_out = [value for value in values if value.outer is not None]
        laid_out.sort(key=self.is_free)  # what has its place comes first
        for value in laid_out[1:]:
            if not (equal(value.outer, laid_out[0].outer) and equal(value.inner, laid_out[0].inner)):
                reason = "operands have their rows in different places of a merged dimension"
                self.wish(value, laid_out[0].outer, laid_out[0].inner, reason)
        return laid_out[0] if laid_out else None

    def is_free(self, value: Value) -> bool:
        """Whether its rows are where a saved tensor has them that may have them elsewhere."""
        return value.origin is not None and value.origin not in self.placed

    def wish(self, value: Value, outer: sympy.Expr, inner: sympy.Expr, reason: str) -> None:
        """An op wants the rows of a value there. If they may be, the walk goes on as if, and is repeated."""
        fits = is_whole(outer) and is_whole(inner) and equal(outer * inner, value.outer * value.inner)
        if not (self.is_free(value) and fits):
            raise RowsMixedError(reason)
        self.wishes.setdefault(value.origin, (outer, inner))

    # ---- ops ------------------------------------------------------------------------------------------------------

    def _call(self, node: fx.Node):
        out = node.meta.get("val")
        if node.op == "get_attr":
            if not isinstance(out, Tensor):
                raise RowsMixedError("a constant that is not known")
            return Value(self._shape(out))
        if node.target is getitem and isinstance(self.known.get(node.args[0]), tuple):
            return self.known[node.args[0]][node.args[1]]
        if not isinstance(out, (Tensor, tuple, list)):
            return None  # a size
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._argument)
        self.taken = set()
        try:
            found = self._result_of(node.target, out, args, kwargs)
            if isinstance(found, Value) and found.source is not None:
                self.taken.add(found.source)
            return found
        finally:
            self.plain |= {value.source for value in tensors((args, kwargs))} - self.taken - {None}

    def _result_of(self, op, out, args, kwargs):
        values = list(tensors((args, kwargs)))
        if not isinstance(op, torch._ops.OpOverload):
            raise RowsMixedError("not an op whose rows are known")
        name = op.overloadpacket.__name__
        rule = PROOF[name]
        if rule is None and (torch.Tag.pointwise in op.tags or name in POINTWISE):
            rule = pointwise
        unknown = next((value for value in values if value.unknown), None)
        if unknown is not None and rule is not pointwise:
            raise RowsMixedError(unknown.unknown)
        shapes = [self._shape(each) for each in out] if isinstance(out, (tuple, list)) else self._shape(out)
        if not self._touches(values, args, kwargs, shapes) and torch.Tag.nondeterministic_seeded not in op.tags:
            return self._same(rule, args, kwargs, shapes, name)
        if rule is None:
            raise RowsMixedError("not an op whose rows are known")
        found = rule(self, name, shapes, *args, **kwargs)
        counted = any(value.numbers for value in values) and name not in INDEXING
        if counted and not (isinstance(found, Value) and (found.numbers or found.zero == EVERYWHERE)):
            raise RowsMixedError("the number of a row is part of a value")  # among the kept rows it has another one
        return tuple(found) if isinstance(found, list) else found

    def _same(self, rule, args, kwargs, shape, name) -> Value | tuple:
        """Where no operand carries rows, any op may be; zeros are followed if a rule does so."""
        if isinstance(shape, list):
            return tuple(Value(each) for each in shape)
        if rule is None:
            return Value(shape)
        try:
            return rule(self, name, shape, *args, **kwargs)
        except RowsMixedError:
            return Value(shape)

    def _argument(self, node: fx.Node):
        if node in self.known and self.known[node] is not None:
            return self.known[node]
        return node.meta["val"]

    def _touches(self, values, args, kwargs, shapes) -> bool:
        """Whether rows, or their number, have a part in this op."""
        if any(value.dim is not None or value.unknown for value in values):
            return True
        shapes = shapes if isinstance(shapes, list) else [shapes]
        return self.counts_rows((args, kwargs)) or any(self.rows_in(shape) for shape in shapes)

    def counts_rows(self, args: Any) -> bool:
        """Whether the batch size is among the arguments."""
        return any(self.batch in x.node.expr.free_symbols for x in tree_iter(args) if isinstance(x, _SYMBOLIC))


def tensors(args: Any):
    return (x for x in tree_iter(args) if isinstance(x, Value))


def equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    return sympy.expand(a - b) == 0


def is_whole(factor: sympy.Expr) -> bool:
    """Whether a product of positive sizes by others is one of integers."""
    numerator, denominator = sympy.fraction(sympy.cancel(factor))
    return denominator == 1 and numerator != 0


def zero_of(x: Any) -> int:
    """Where an operand, or a number, is zero."""
    if isinstance(x, Value):
        return NOWHERE if x.unknown else x.zero
    return EVERYWHERE if isinstance(x, (int, float)) and x == 0 else NOWHERE


# ---- pointwise ----------------------------------------------------------------------------------------------------

_OF_FIRST = {  # zero where their first operand is
    "_to_copy", "abs", "alias", "asinh", "atan", "ceil", "clone", "convert_element_type", "detach", "div", "erf",
    "expm1", "floor", "lift_fresh_copy", "neg", "relu", "round", "sign", "sin", "sinh", "sqrt", "tan", "tanh",
    "trunc",
}  # fmt: skip


def _zero_of_pointwise(name: str, args: tuple) -> int:
    zeros = [zero_of(x) for x in args]
    if name in ("mul", "logical_and", "bitwise_and"):
        return max(zeros[:2])
    if name in ("add", "sub", "rsub", "maximum", "minimum", "logical_or", "bitwise_or"):
        return min(zeros[:2])
    if name == "where":
        return min(zeros[1:])
    if name == "masked_fill":
        return min(zeros[0], zeros[2])
    if name == "fma":
        return min(max(zeros[:2]), zeros[2])
    if name == "addcmul":
        return min(zeros[0], max(zeros[1:3]))
    if name == "addcdiv":
        return min(zeros[:2])
    if name == "threshold":
        return zeros[0] if args[2] == 0 else NOWHERE
    if name == "pow":
        return zeros[0] if isinstance(args[1], (int, float)) and args[1] > 0 else NOWHERE
    if name in _OF_FIRST or name.endswith("_backward"):
        return zeros[0]
    return NOWHERE


def pointwise(walk: Walk, name: str, shape: tuple, *args, **kwargs) -> Value:
    zero = _zero_of_pointwise(name, args)
    if zero == EVERYWHERE:  # whatever else has a part in it
        return walk.uniform(shape, EVERYWHERE)
    values = list(tensors((args, kwargs)))
    for value in values:
        if value.unknown:
            raise RowsMixedError(value.unknown)
    if walk.counts_rows((args, kwargs)):
        raise RowsMixedError("the batch size is part of a value")
    carriers = [value for value in values if value.dim is not None]
    if not carriers:
        return walk.result(shape, zero=zero)
    dims = {value.dim - len(value.shape) for value in carriers}
    if len(dims) > 1:
        raise RowsMixedError("rows meet rows")
    numbers = len(values) == 1 and values[0].numbers and name in ("clone", "alias", "detach")
    return walk.result(shape, dims.pop() + len(shape), walk.layout(carriers), zero, numbers)


@implements("native_dropout_backward", table=PROOF)
def _dropout_backward(walk, name, shape, grad, mask, scale):
    return pointwise(walk, "mul", shape, grad, mask)


# Of these not all versions of PyTorch tell that they are pointwise.
implements("clone", "alias", "detach", "_to_copy", "convert_element_type", "fma", table=PROOF)(pointwise)
