"""
Which dimension of each tensor of a backward graph carries the rows of the batch, and the proof that no op mixes them.

AOTAutograd writes a backward graph for a symbolic batch size. Run on the kept rows of everything that carries rows, it
computes the gradients of the whole batch if, op by op, each tensor of that run is

- the *same* as in the run on the whole batch (weights and their gradients), or
- its *rows*: row r of it depends on row r of the operands alone.

A sum over rows is the same only if what it sums is zero in all other rows, as the gradient of the kept ones is. So
each value has a degree of `zero` as well. An op that no rule here understands leaves a value of which nothing is
known; if it reaches a gradient, the graph is refused.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import getitem
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor, fx

from hf_trim.backward.rules import POINTWISE


NOWHERE, ELSEWHERE, EVERYWHERE = 0, 1, 2  # where a value is zero: it may be none, in all rows but the kept, in all
RULES: dict[str, Callable] = {}


class Mixed(Exception):
    """The rows of an op's result are not known to be independent."""


@dataclass(frozen=True)
class Value:
    """
    What is known of a tensor in a backward graph.

    Args:
        shape (`tuple[sympy.Expr, ...]`): Its symbolic shape.
        dim (`int`, *optional*): The dimension that carries rows; `None` if it is the same for any rows.
        outer, inner (`sympy.Expr`, *optional*): Sizes of what is merged in front of and behind the rows in that
            dimension; `None` if all rows are equal, and any will do.
        zero (`int`): `NOWHERE`, `ELSEWHERE` (in rows that are not kept), `EVERYWHERE`.
        numbers (`bool`): Whether it holds the number of each row.
        source (`torch.fx.Node`, *optional*): The input of the graph that it is, unchanged.
        unknown (`str`): Why nothing is known.
    """

    shape: tuple
    dim: int | None = None
    outer: Any = None
    inner: Any = None
    zero: int = NOWHERE
    numbers: bool = False
    source: fx.Node | None = None
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
    return _Walk(batch, tangents).over(graph)


class _Walk:
    def __init__(self, batch: sympy.Symbol, tangents: dict[fx.Node, int]):
        self.batch, self.tangents = batch, tangents
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
            except Mixed as reason:
                self.known[node] = self._unknown(node, str(reason))
            if node.op == "placeholder":
                proof.inputs.append(self.known[node])
        proof.outputs = outputs
        proof.row_numbers = {inputs.index(node) for node in self.numbers}
        unknown = [value.unknown for value in (*proof.inputs, *outputs) if value is not None and value.unknown]
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
        if self.batch in factor.free_symbols or not _is_whole(factor):
            raise Mixed(f"a dimension of size {size} is no multiple of the batch size {self.batch}")
        return factor

    def _input(self, node: fx.Node) -> Value | None:
        tensor = node.meta.get("val")
        if not isinstance(tensor, Tensor):
            return None
        shape, zero = self._shape(tensor), self.tangents.get(node, NOWHERE)
        rows = self.rows_in(shape)
        if len(rows) > 1:
            raise Mixed(f"{node.name} has the batch size {self.batch} in two dimensions")
        if not rows:
            return Value(shape, zero=EVERYWHERE if zero == EVERYWHERE else NOWHERE, source=node)
        # [B, m] merged; [m, B] would not fit to the gradient's layout, and be found out where they meet
        inner = self.merged(shape[rows[0]])
        return Value(shape, rows[0], sympy.Integer(1), inner, zero, source=node)

    def result(self, shape, dim=None, like: Value | None = None, zero: int = NOWHERE, numbers: bool = False) -> Value:
        """A result with rows in `dim`, laid out as those of `like`; checked against its symbolic shape."""
        shape = tuple(shape)
        rows = self.rows_in(shape)
        if rows != ([] if dim is None else [dim]):
            raise Mixed(f"rows are expected in dimension {dim} of {shape}")
        if dim is None:
            return Value(shape, zero=EVERYWHERE if zero == EVERYWHERE else NOWHERE)
        outer, inner = (None, None) if like is None else (like.outer, like.inner)
        if outer is not None and not _equal(outer * inner * self.batch, shape[dim]):
            raise Mixed(f"{shape[dim]} rows are not {outer}*{self.batch}*{inner}")
        return Value(shape, dim, outer, inner, zero, numbers)

    def layout(self, values: Iterable[Value]) -> Value | None:
        """The one whose layout of rows all of them have."""
        laid_out = [value for value in values if value.outer is not None]
        for value in laid_out[1:]:
            if not (_equal(value.outer, laid_out[0].outer) and _equal(value.inner, laid_out[0].inner)):
                raise Mixed("operands have their rows in different places of a merged dimension")
        return laid_out[0] if laid_out else None

    # ---- ops ------------------------------------------------------------------------------------------------------

    def _call(self, node: fx.Node):
        out = node.meta.get("val")
        if node.op == "get_attr":
            return (
                Value(self._shape(out)) if isinstance(out, Tensor) else Value((), unknown=f"{node.target}: a constant")
            )
        if node.target is getitem and isinstance(self.known.get(node.args[0]), tuple):
            return self.known[node.args[0]][node.args[1]]
        if not isinstance(out, (Tensor, tuple, list)):
            return None  # a size
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._argument)
        self.taken = set()
        try:
            return self._result_of(node.target, out, args, kwargs)
        finally:
            self.numbers |= self.taken
            self.plain |= {value.source for value in _tensors((args, kwargs))} - self.taken - {None}

    def _result_of(self, op, out, args, kwargs):
        values = list(_tensors((args, kwargs)))
        if not isinstance(op, torch._ops.OpOverload) or op._schema.is_mutable:
            raise Mixed("not an op whose rows are known")
        name = op.overloadpacket.__name__
        rule = RULES.get(name)
        if rule is None and (torch.Tag.pointwise in op.tags or name in POINTWISE):
            rule = pointwise
        unknown = next((value for value in values if value.unknown), None)
        if unknown is not None and rule is not pointwise:
            raise Mixed(unknown.unknown)
        shapes = [self._shape(each) for each in out] if isinstance(out, (tuple, list)) else self._shape(out)
        if not self._touches(values, args, kwargs, shapes) and torch.Tag.nondeterministic_seeded not in op.tags:
            return (
                [Value(s) for s in shapes]
                if isinstance(shapes, list)
                else self._same(rule, args, kwargs, shapes, name)
            )
        if rule is None:
            raise Mixed("not an op whose rows are known")
        found = rule(self, name, shapes, *args, **kwargs)
        counted = any(value.numbers for value in values) and name not in _INDEXING
        if counted and not (isinstance(found, Value) and (found.numbers or found.zero == EVERYWHERE)):
            raise Mixed("the number of a row is part of a value")  # among the kept rows it has another one
        return tuple(found) if isinstance(found, list) else found

    def _same(self, rule, args, kwargs, shape, name) -> Value | tuple:
        """Where no operand carries rows, any op may be; zeros are followed if a rule does so."""
        if isinstance(shape, list):
            return tuple(Value(each) for each in shape)
        if rule is None:
            return Value(shape)
        try:
            return rule(self, name, shape, *args, **kwargs)
        except Mixed:
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
        return any(self.batch in x.node.expr.free_symbols for x in _leaves(args) if isinstance(x, SymInt))


def _leaves(args: Any):
    if isinstance(args, (tuple, list)):
        for each in args:
            yield from _leaves(each)
    elif isinstance(args, dict):
        yield from _leaves(list(args.values()))
    else:
        yield args


def _tensors(args: Any):
    return (x for x in _leaves(args) if isinstance(x, Value))


def _equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    return sympy.expand(a - b) == 0


def _is_whole(factor: sympy.Expr) -> bool:
    """Whether a product of positive sizes by others is one of integers."""
    numerator, denominator = sympy.fraction(sympy.cancel(factor))
    return denominator == 1 and numerator != 0


def rule(*names: str):
    """Registers a function of walk, name, symbolic shape of the result (or list of shapes) and the op's arguments."""

    def register(function):
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def zero_of(x: Any) -> int:
    """Where an operand, or a number, is zero."""
    if isinstance(x, Value):
        return NOWHERE if x.unknown else x.zero
    return EVERYWHERE if isinstance(x, (int, float)) and x == 0 else NOWHERE


def same(*values: Any) -> None:
    """Operands that must not carry rows."""
    if any(isinstance(value, Value) and value.dim is not None for value in values):
        raise Mixed("an operand that serves all rows carries rows")


def is_batch_first(*values: Value) -> None:
    """Operands that must carry rows in their first dimension, not merged with anything."""
    for value in values:
        if value.dim != 0 or (value.outer is not None and not (value.outer == value.inner == 1)):
            raise Mixed("rows are not samples")


# ---- pointwise ----------------------------------------------------------------------------------------------------

_OF_FIRST = {  # zero where their first operand is
    "_to_copy", "abs", "alias", "asinh", "atan", "ceil", "clone", "convert_element_type", "detach", "div", "erf",
    "expm1", "floor", "lift_fresh_copy", "neg", "relu", "round", "sign", "sin", "sinh", "sqrt", "tan", "tanh",
    "to_dtype", "trunc",
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


def pointwise(walk: _Walk, name: str, shape: tuple, *args, **kwargs) -> Value:
    zero = _zero_of_pointwise(name, args)
    if zero == EVERYWHERE:  # whatever else has a part in it
        rows = walk.rows_in(shape)
        if len(rows) > 1:
            raise Mixed("rows meet rows")
        return walk.result(shape, rows[0] if rows else None, zero=EVERYWHERE)
    values = list(_tensors((args, kwargs)))
    for value in values:
        if value.unknown:
            raise Mixed(value.unknown)
    if walk.counts_rows((args, kwargs)):
        raise Mixed("the batch size is part of a value")
    carriers = [value for value in values if value.dim is not None]
    if not carriers:
        return walk.result(shape, zero=zero)
    dims = {value.dim - len(value.shape) for value in carriers}
    if len(dims) > 1:
        raise Mixed("rows meet rows")
    numbers = len(values) == 1 and values[0].numbers and name in ("clone", "alias", "detach")
    return walk.result(shape, dims.pop() + len(shape), walk.layout(carriers), zero, numbers)


@rule("native_dropout_backward")
def _dropout_backward(walk, name, shape, grad, mask, scale):
    return pointwise(walk, "mul", shape, grad, mask)


@rule("clone", "alias", "detach", "_to_copy", "convert_element_type", "lift_fresh_copy", "contiguous", "fma")
def _copy(walk, name, shape, x, *args, **kwargs):
    return pointwise(walk, name, shape, x, *args, **kwargs)


# ---- tensors made of a number -------------------------------------------------------------------------------------


@rule("full", "full_like", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "new_full",
      "scalar_tensor")  # fmt: skip
def _constant(walk, name, shape, *args, **kwargs):
    if "full" in name or name == "scalar_tensor":
        value = args[0 if name == "scalar_tensor" else 2 if name == "new_full" else 1]
        if isinstance(value, Value) or walk.counts_rows(value):
            raise Mixed("the batch size is part of a value")
    else:
        value = "ones" in name
    rows = walk.rows_in(shape)
    if len(rows) > 1:
        raise Mixed("rows meet rows")
    return walk.result(shape, rows[0] if rows else None, zero=EVERYWHERE if value == 0 else NOWHERE)


@rule("iota", "arange")
def _numbers(walk, name, shape, *args, start=None, step=None, **kwargs):
    if name == "arange":
        start, step = (args[0] if len(args) > 1 else 0), (args[2] if len(args) > 2 else 1)
    rows = walk.rows_in(shape)
    if not rows:
        if walk.counts_rows((args, start, step)):
            raise Mixed("the batch size is part of a value")
        return walk.result(shape)
    if start != 0 or step != 1 or not _equal(shape[0], walk.batch):
        raise Mixed("numbers of rows that are not counted from 0")
    return replace(walk.result(shape, 0, numbers=True), outer=sympy.Integer(1), inner=sympy.Integer(1))


# ---- views --------------------------------------------------------------------------------------------------------


@rule("view", "_unsafe_view", "reshape", "unflatten", "flatten")
def _view(walk, name, shape, x, *args):
    if x.dim is None:
        return walk.result(shape, zero=x.zero)
    rows = walk.rows_in(shape)
    if len(rows) != 1:
        raise Mixed("rows meet rows")
    at = rows[0]
    if x.outer is None:
        return walk.result(shape, at, zero=x.zero)
    in_front = _product(x.shape[: x.dim]) * x.outer
    outer = sympy.cancel(in_front / _product(shape[:at]))
    inner = sympy.cancel(walk.merged(shape[at]) / outer)
    if not _is_whole(outer) or not _is_whole(inner):
        raise Mixed("a view splits the rows")
    numbers = x.numbers and outer == inner == 1
    return walk.result(shape, at, replace(x, outer=outer, inner=inner), x.zero, numbers)


def _product(sizes) -> sympy.Expr:
    return reduce(lambda a, b: a * b, sizes, sympy.Integer(1))


def _moved(walk, shape, x, order) -> Value:
    """Dimension `order[d]` becomes dimension d."""
    return walk.result(shape, None if x.dim is None else order.index(x.dim), x, x.zero)


@rule("permute")
def _permute(walk, name, shape, x, dims):
    return _moved(walk, shape, x, [d % len(shape) for d in dims])


@rule("t")
def _t(walk, name, shape, x):
    return _moved(walk, shape, x, list(range(len(shape)))[::-1])


@rule("transpose")
def _transpose(walk, name, shape, x, a, b):
    order = list(range(len(shape)))
    order[a], order[b] = order[b], order[a]
    return _moved(walk, shape, x, order)


@rule("unsqueeze")
def _unsqueeze(walk, name, shape, x, dim):
    dim %= len(shape)
    at = None if x.dim is None else x.dim + (x.dim >= dim)
    return walk.result(shape, at, x, x.zero, x.numbers)


@rule("squeeze")
def _squeeze(walk, name, shape, x, dims=None):
    if dims is None:
        dims = [d for d, size in enumerate(x.shape) if size == 1]
    dims = {d % len(x.shape) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    dims = {d for d in dims if x.shape[d] == 1}
    at = None if x.dim is None else x.dim - sum(d < x.dim for d in dims)
    return walk.result(shape, at, x, x.zero, x.numbers)


@rule("expand")
def _expand(walk, name, shape, x, sizes, **kwargs):
    if x.dim is not None:
        return walk.result(shape, x.dim + len(shape) - len(x.shape), x, x.zero, x.numbers)
    rows = walk.rows_in(shape)
    if len(rows) > 1:
        raise Mixed("rows meet rows")
    return walk.result(shape, rows[0] if rows else None, zero=x.zero)  # all rows are equal


@rule("repeat")
def _repeat(walk, name, shape, x, repeats):
    added = len(shape) - len(x.shape)
    if x.dim is None or repeats[x.dim + added] != 1 or walk.counts_rows(repeats):
        raise Mixed("rows are repeated")
    return walk.result(shape, x.dim + added, x, x.zero)


def _is_whole_slice(x, dim, start, end, step) -> bool:
    size = x.shape[dim]
    ends = end is None or (isinstance(end, int) and end >= 2**62) or _equal(expression(end), size)
    return start in (None, 0) and ends and step == 1


@rule("slice")
def _slice(walk, name, shape, x, dim=0, start=None, end=None, step=1):
    dim %= len(shape)
    if dim == x.dim:
        if not _is_whole_slice(x, dim, start, end, step):
            raise Mixed("a part of the rows is taken")
    elif walk.counts_rows((start, end, step)):
        raise Mixed("the batch size is part of a value")
    return walk.result(shape, x.dim, x, x.zero, x.numbers)


@rule("select")
def _select(walk, name, shape, x, dim, index):
    dim %= len(x.shape)
    if dim == x.dim or walk.counts_rows(index):
        raise Mixed("one row is taken")
    at = None if x.dim is None else x.dim - (x.dim > dim)
    return walk.result(shape, at, x, x.zero, x.numbers)


@rule("select_backward")
def _select_backward(walk, name, shape, grad, sizes, dim, index):
    dim %= len(shape)
    at = None if grad.dim is None else grad.dim + (grad.dim >= dim)
    if walk.counts_rows(index):
        raise Mixed("the batch size is part of a value")
    return walk.result(shape, at, grad, grad.zero)


@rule("slice_backward")
def _slice_backward(walk, name, shape, grad, sizes, dim, start, end, step):
    if grad.dim == dim % len(shape):
        if not (_is_whole_slice(grad, grad.dim, start, end, step) and _equal(grad.shape[grad.dim], shape[grad.dim])):
            raise Mixed("a part of the rows is taken")
    elif walk.counts_rows((start, end, step)):
        raise Mixed("the batch size is part of a value")
    return walk.result(shape, grad.dim, grad, grad.zero)


@rule("select_scatter", "slice_scatter")
def _scatter_into(walk, name, shape, x, source, dim=0, *place, **kwargs):
    dim %= len(shape)
    if walk.counts_rows((place, kwargs)) and x.dim != dim:
        raise Mixed("the batch size is part of a value")
    at = source.dim
    if at is not None and name == "select_scatter":
        at += at >= dim
    if x.dim != at:
        raise Mixed("rows meet rows")
    if at == dim:
        start, end, step = (*place, *(None, None, 1)[len(place) :])
        whole = _is_whole_slice(x, dim, kwargs.get("start", start), kwargs.get("end", end), kwargs.get("step", step))
        if name == "select_scatter" or not whole:
            raise Mixed("a part of the rows is taken")
    return walk.result(shape, at, walk.layout([x, source]), min(x.zero, source.zero))


@rule("cat", "stack")
def _cat(walk, name, shape, tensors, dim=0):
    dim %= len(shape)
    dims = {None if x.dim is None else x.dim + (name == "stack" and x.dim >= dim) for x in tensors}
    if len(dims) > 1:
        raise Mixed("rows meet rows")
    at, zero = dims.pop(), min(x.zero for x in tensors)
    if name == "stack" or at != dim or at is None:
        return walk.result(shape, at, walk.layout(tensors), zero)
    # [B, ...] after [B, ...], as in the gradient of an `unbind`
    if any(x.outer is None or not _equal(x.inner, tensors[0].inner) for x in tensors):
        raise Mixed("rows are joined to rows")
    return walk.result(shape, at, replace(tensors[0], outer=sum(x.outer for x in tensors)), zero)


@rule("split", "split_with_sizes", "unbind", "chunk")
def _split(walk, name, shapes, x, *args, **kwargs):
    dim = kwargs.get("dim", args[-1] if len(args) == (1 if name == "unbind" else 2) else 0) % len(x.shape)
    if dim == x.dim:
        raise Mixed("the rows are split")
    at = x.dim if x.dim is None or name != "unbind" else x.dim - (x.dim > dim)
    return [walk.result(shape, at, x, x.zero) for shape in shapes]


@rule("constant_pad_nd")
def _pad(walk, name, shape, x, pad, value=0):
    if x.dim is not None:
        behind = len(x.shape) - 1 - x.dim
        if any(each != 0 for each in pad[2 * behind : 2 * behind + 2]) or walk.counts_rows(pad):
            raise Mixed("rows are added")
    return walk.result(shape, x.dim, x, x.zero if value == 0 else NOWHERE)


@rule("flip", "roll")
def _turn(walk, name, shape, x, *args):
    dims = args[-1] if name == "flip" or len(args) > 1 else []
    dims = {d % len(shape) for d in dims}
    if not dims or x.dim in dims:
        raise Mixed("rows change places")
    return walk.result(shape, x.dim, x, x.zero)


# ---- reductions ---------------------------------------------------------------------------------------------------


def _dims(x: Value, dims: Any) -> set[int]:
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return set(range(len(x.shape)))
    return {d % len(x.shape) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}


def _reduced(walk, shape, x, dims, zero) -> Value:
    """Rows of a reduction over other dimensions."""
    if x.dim in dims:
        raise Mixed("a value of all rows together")
    if x.dim is None:
        return walk.result(shape, zero=zero)
    kept = len(shape) == len(x.shape)
    return walk.result(shape, x.dim if kept else x.dim - sum(d < x.dim for d in dims), x, zero)


@rule("sum")
def _sum(walk, name, shape, x, dims=None, *args, **kwargs):
    dims = _dims(x, dims)
    if x.dim not in dims or x.dim is None:
        return _reduced(walk, shape, x, dims, x.zero)
    if x.zero == NOWHERE:
        raise Mixed("a sum over rows that are not all kept")
    # What is merged with the rows is summed, too, and what is the same of it is zero where all is.
    return walk.result(shape, zero=x.zero)


@rule("mean", "prod", "amax", "amin", "any", "all", "logsumexp", "argmax", "argmin")
def _reduction(walk, name, shape, x, dims=None, *args, **kwargs):
    zero = x.zero if name in ("mean", "amax", "amin", "any") else NOWHERE
    return _reduced(walk, shape, x, _dims(x, dims), zero)


@rule("var_mean", "var", "std", "std_mean")
def _variance(walk, name, shapes, x, dims=None, *args, **kwargs):
    several = isinstance(shapes, list)
    found = [_reduced(walk, shape, x, _dims(x, dims), NOWHERE) for shape in (shapes if several else [shapes])]
    return found if several else found[0]


@rule("_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp")
def _along(walk, name, shape, x, dim, *args, **kwargs):
    if x.dim == dim % len(shape):
        raise Mixed("a value of all rows together")
    return walk.result(shape, x.dim, x, x.zero if name == "cumsum" else NOWHERE)


@rule("sort", "topk", "max", "min", "cummax", "cummin")
def _along_with_indices(walk, name, shapes, x, *args, **kwargs):
    if not isinstance(shapes, list):
        raise Mixed("a value of all rows together")
    dims = {"sort": 0, "topk": 1}
    at = dims.get(name, 0)
    dim = kwargs.get("dim", args[at] if len(args) > at else -1)
    return [_reduced(walk, shape, x, {dim % len(x.shape)}, NOWHERE) for shape in shapes]


@rule("_softmax_backward_data", "_log_softmax_backward_data")
def _softmax_backward(walk, name, shape, grad, out, dim, dtype):
    if dim % len(shape) in (grad.dim, out.dim):
        raise Mixed("a value of all rows together")
    return pointwise(walk, "mul", shape, grad, out) if grad.zero else pointwise(walk, "softmax", shape, grad, out)


# ---- products -----------------------------------------------------------------------------------------------------


def _product_of(walk, shape, a: Value, b: Value) -> Value:
    """`[..., M, K] @ [..., K, N]`"""
    last = len(shape) - 1
    of_a = None if a.dim is None else a.dim  # the dimension of [..., M, K]
    of_b = None if b.dim is None else b.dim  # the dimension of [..., K, N]
    zero = max(a.zero, b.zero)
    if of_a is None and of_b is None:
        return walk.result(shape, zero=zero)
    layout = walk.layout([x for x in (a, b) if x.dim is not None])
    summed = of_a == last and of_b == last - 1
    if summed:
        if zero == NOWHERE:
            raise Mixed("a sum over rows that are not all kept")
        return walk.result(shape, zero=zero)
    batched = last > 1 and of_a == of_b == 0
    if batched or (of_b is None and of_a == last - 1):
        return walk.result(shape, of_a, layout, zero)
    if of_a is None and of_b == last:
        return walk.result(shape, of_b, layout, zero)
    raise Mixed("rows meet rows")


@rule("mm", "bmm")
def _mm(walk, name, shape, a, b, *args, **kwargs):
    return _product_of(walk, shape, a, b)


@rule("addmm", "baddbmm")
def _addmm(walk, name, shape, bias, a, b, *, beta=1, alpha=1):
    return pointwise(walk, "add", shape, bias, _product_of(walk, shape, a, b))


# ---- attention, convolution, norms, losses, pooling ----------------------------------------------------------------


def _first_rows(walk, name, shape, like, zero) -> Value:
    """An output with rows in front; others, such as a kernel's random state, must go unused."""
    if walk.rows_in(shape) != [0]:
        return Value(shape, unknown=f"{name}: an output without rows")
    return walk.result(shape, 0, like, zero)


@rule(
    "_scaled_dot_product_flash_attention_for_cpu_backward", "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_efficient_attention_backward", "_scaled_dot_product_cudnn_attention_backward",
)  # fmt: skip
def _attention_backward(walk, name, shapes, grad, query, key, value, *args, **kwargs):
    # Each has one float among its arguments by position, and kernels draw their masks by the position in the batch.
    if next(x for x in args if isinstance(x, float)) != 0:
        raise Mixed("dropout inside of the attention kernel")
    carriers = [x for x in _tensors((grad, query, key, value, args, kwargs)) if x.dim is not None]
    is_batch_first(grad, query, key, value, *carriers)
    asked = next((x for x in args if isinstance(x, (list, tuple))), None)  # which of the gradients are asked for
    if asked is not None and len(asked) > 3 and asked[3]:
        raise Mixed("the bias wants a gradient")
    return [
        walk.result(shape, 0, grad, grad.zero)
        if walk.rows_in(shape) == [0]
        else Value(shape, unknown=f"{name}: output")
        for shape in shapes
    ]


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
      "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")  # fmt: skip
def _attention(walk, name, shapes, query, key, value, *args, **kwargs):
    dropout = [x for x in (*args, kwargs.get("dropout_p", 0.0)) if isinstance(x, float)]
    if any(dropout):
        raise Mixed("dropout inside of the attention kernel")
    is_batch_first(query, key, value, *(x for x in _tensors((args, kwargs)) if x.dim is not None))
    return [_first_rows(walk, name, shape, query, NOWHERE) for shape in shapes]


@rule("convolution")
def _convolution(walk, name, shape, x, weight, bias, *args):
    same(weight, bias)
    is_batch_first(x)
    return walk.result(shape, 0, x)


@rule("convolution_backward")
def _convolution_backward(walk, name, shapes, grad, x, weight, bias_sizes, *args):
    same(weight)
    is_batch_first(grad, x)
    if not grad.zero:
        raise Mixed("a sum over rows that are not all kept")
    return [walk.result(shape, 0 if at == 0 and shape else None, grad, grad.zero) for at, shape in enumerate(shapes)]


@rule("native_layer_norm_backward", "_fused_rms_norm_backward")
def _norm_backward(walk, name, shapes, grad, x, normalized, *others):
    first = len(grad.shape) - len(normalized)
    carriers = [each for each in (grad, x, *_tensors(others)) if each.dim is not None]
    if any(each.dim >= first or each.dim != grad.dim for each in carriers):
        raise Mixed("rows are normalized")
    if not grad.zero:
        raise Mixed("a sum over rows that are not all kept")
    return [
        walk.result(shape, grad.dim if at == 0 and shape else None, walk.layout(carriers), grad.zero)
        for at, shape in enumerate(shapes)
    ]


@rule("native_layer_norm", "_fused_rms_norm")
def _norm(walk, name, shapes, x, normalized, *others):
    same(*others)
    if x.dim is not None and x.dim >= len(x.shape) - len(normalized):
        raise Mixed("rows are normalized")
    return [walk.result(shape, x.dim, x) for shape in shapes]


@rule("native_group_norm_backward")
def _group_norm_backward(walk, name, shapes, grad, x, mean, rstd, weight, *sizes):
    same(weight)
    is_batch_first(grad, x, mean, rstd)
    if not grad.zero:
        raise Mixed("a sum over rows that are not all kept")
    return [walk.result(shape, 0 if at == 0 and shape else None, grad, grad.zero) for at, shape in enumerate(shapes)]


@rule("native_group_norm")
def _group_norm(walk, name, shapes, x, weight, bias, *sizes):
    same(weight, bias)
    is_batch_first(x)
    return [walk.result(shape, 0, x) for shape in shapes]


@rule("native_batch_norm_backward")
def _batch_norm_backward(walk, name, shapes, grad, x, weight, mean, variance, saved_mean, saved_rstd, train, *others):
    if train:
        raise Mixed("batch norm in training mode mixes rows")
    same(weight, mean, variance, saved_mean, saved_rstd)
    is_batch_first(grad, x)
    if not grad.zero:
        raise Mixed("a sum over rows that are not all kept")
    return [walk.result(shape, 0 if at == 0 and shape else None, grad, grad.zero) for at, shape in enumerate(shapes)]


@rule("nll_loss_backward", "nll_loss2d_backward", "mse_loss_backward", "smooth_l1_loss_backward",
      "huber_loss_backward", "binary_cross_entropy_backward")  # fmt: skip
def _loss_backward(walk, name, shape, grad, x, target, *others):
    if grad.zero == EVERYWHERE:  # a loss that no gradient comes from
        return pointwise(walk, "mul", shape, grad, x)
    reduction = next(each for each in others if isinstance(each, int))
    if reduction != 0:
        raise Mixed("a value of all rows together")
    is_batch_first(grad, x, target)
    same(*others)
    return walk.result(shape, 0, grad, grad.zero)


@rule("max_pool2d_with_indices_backward", "avg_pool2d_backward", "_adaptive_avg_pool2d_backward",
      "adaptive_max_pool2d_backward")  # fmt: skip
def _pool_backward(walk, name, shape, grad, x, *args):
    is_batch_first(grad, x, *_tensors(args))
    return walk.result(shape, 0, grad, grad.zero)


# ---- indexing -----------------------------------------------------------------------------------------------------


@rule("gather")
def _gather(walk, name, shape, x, dim, index, **kwargs):
    if x.dim is None or x.dim == dim % len(shape) or index.dim != x.dim:
        raise Mixed("rows are looked up")
    return walk.result(shape, x.dim, walk.layout([x, index]), x.zero)


@rule("scatter", "scatter_add")
def _scatter(walk, name, shape, x, dim, index, source, **kwargs):
    carriers = [x, index] + ([source] if isinstance(source, Value) else [])
    if any(each.dim is None or each.dim != x.dim for each in carriers) or x.dim == dim % len(shape):
        raise Mixed("rows are looked up")
    return walk.result(shape, x.dim, walk.layout(carriers), min(x.zero, zero_of(source)))


@rule("embedding")
def _embedding(walk, name, shape, weight, index, *args):
    same(weight)
    return walk.result(shape, index.dim, index)


@rule("embedding_dense_backward")
def _embedding_backward(walk, name, shape, grad, index, size, padding, by_frequency):
    if by_frequency:
        raise Mixed("frequencies are counted over the batch")
    if grad.dim is None or grad.dim != index.dim or not grad.zero:
        raise Mixed("a sum over rows that are not all kept")
    walk.layout([grad, index])
    return walk.result(shape, zero=grad.zero)


_INDEXING = ("index", "_unsafe_index", "index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate")


def _indexed(walk, x: Value, indices) -> tuple[Value | None, bool]:
    """
    What `x[indices]` and its backward op look up: an index that carries rows (or `None`), aligned at the end of all
    indices' common shape, and whether it does so row by row in an `x` that carries rows.
    """
    given = {d: index for d, index in enumerate(indices) if index is not None}
    carriers = [index for index in given.values() if index.dim is not None]
    if len({index.dim - len(index.shape) for index in carriers}) > 1:
        raise Mixed("rows meet rows")
    carrier = walk.layout(carriers) or (carriers[0] if carriers else None)
    if x.numbers or any(index.numbers for d, index in given.items() if d != x.dim):
        raise Mixed("the number of a row is part of a value")
    if x.dim is None:
        return carrier, False
    if x.dim not in given:
        raise Mixed("rows are looked up") if carriers else Mixed("an index beside the rows")
    at = given[x.dim]
    if not at.numbers and at.source is not None and len(at.shape) == 1 and at.dim == 0 and at.inner == 1:
        walk.taken.add(at.source)  # whether it does is looked at when it is there
    elif not at.numbers:
        raise Mixed("rows are looked up")
    if not (x.outer is None or x.outer == x.inner == 1):
        raise Mixed("rows are looked up in a merged dimension")
    return carrier, True


def _place_of_indices(indices) -> tuple[int, int]:
    """Where the indices' common shape is in `x[indices]`, and its number of dimensions."""
    at = [d for d, index in enumerate(indices) if index is not None]
    common = max(len(index.shape) for index in indices if index is not None)
    return (at[0] if at == list(range(at[0], at[-1] + 1)) else 0), common


@rule("index", "_unsafe_index")
def _index(walk, name, shape, x, indices):
    others = [d for d in range(len(x.shape)) if d >= len(indices) or indices[d] is None]
    first, common = _place_of_indices(indices)
    if x.dim in others and not any(index is not None and index.dim is not None for index in indices):
        in_front = sum(d < x.dim for d in others)  # the same places of each row
        at = in_front if in_front < first else in_front + common
        return walk.result(shape, at, x, x.zero)
    carrier, by_row = _indexed(walk, x, indices)
    if carrier is None:
        return walk.result(shape, zero=x.zero)
    at = first + common + carrier.dim - len(carrier.shape)
    return walk.result(shape, at, carrier, x.zero if by_row or x.zero == EVERYWHERE else NOWHERE)


@rule("index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate")
def _index_put(walk, name, shape, x, *args):
    mask = args[0] if "masked" in name else None
    indices, values, *accumulate = args[1:] if "masked" in name else args
    adds = "accumulate" in name or bool(accumulate and accumulate[0])
    others = [d for d in range(len(x.shape)) if d >= len(indices) or indices[d] is None]
    first, common = _place_of_indices(indices)
    if values.numbers:
        raise Mixed("the number of a row is part of a value")
    if x.dim in others and not any(index is not None and index.dim is not None for index in indices):
        in_front = sum(d < x.dim for d in others)
        at = (in_front if in_front < first else in_front + common) - len(others) - common
        if values.dim is None or values.dim - len(values.shape) != at or mask is not None:
            raise Mixed("rows meet rows")
        return walk.result(shape, x.dim, walk.layout([x, values]), min(x.zero, values.zero))
    carrier, by_row = _indexed(walk, x, indices)
    if carrier is None:
        same(values, mask)
        return walk.result(shape, zero=min(x.zero, values.zero))
    at = first + common + carrier.dim - len(carrier.shape) - len(others) - common
    carriers = [each for each in (values, mask) if each is not None and each.dim is not None]
    if any(each.dim - len(each.shape) != at for each in carriers):
        raise Mixed("rows meet rows")
    layout = walk.layout([carrier, *carriers])
    if by_row:
        return walk.result(shape, x.dim, replace(x, outer=layout.outer, inner=layout.inner), min(x.zero, values.zero))
    if not adds or values.zero == NOWHERE:
        raise Mixed("a sum over rows that are not all kept")
    return walk.result(shape, zero=min(x.zero, values.zero))
