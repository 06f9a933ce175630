"""
Rules that follow from facts (`hf_trim/backward/facts/`): the op runs on the kept rows of its operands.

e.g. `glu_backward(grad, x, 1)` of `[B, T, C]`, B = 4, rows 1 and 3 kept: the fact says that `grad` and `x` have their
rows in dimension 0, which is not 1, and the result too. The op is called with the payload `[2, T, C]` and the kept
rows of `x`, and what it returns is the payload of the result.
"""

from collections.abc import Callable
from itertools import zip_longest
from types import MethodDescriptorType
from typing import Any

from torch import Tensor

from hf_trim.backward._torch_internals import OpOverload, op_name, tree_map_only
from hf_trim.backward.eager.rules.operands import is_zeros
from hf_trim.backward.eager.tensor import RowSparseTensor, RowTensor
from hf_trim.backward.facts import FACTS
from hf_trim.backward.facts.fact import Fact
from hf_trim.backward.registry import ACTIVATIONS, GRADIENTS, overloads, require


def register_derived_rules() -> None:
    """Gives a rule to each op that has a fact, in the tables that have none written by hand."""
    for name, fact in FACTS.items():
        for op in overloads(name):
            rule = view_rule(fact, op) if op.is_view else derived_rule(fact)
            for table in (GRADIENTS, ACTIVATIONS) if fact.grads else (ACTIVATIONS,):
                if op not in table.registered:
                    table.register(op, rule)


def kept_size(ref: RowTensor, size: Any, dim: int) -> Any:
    """A size with the kept rows in the place of all, along `dim` if it is a list."""
    rows, kept = ref.shape[ref.row_dim], ref.payload.shape[ref.row_dim]
    if isinstance(size, int):
        require(size == rows, "the source has other rows")
        return kept
    require(size[dim] in (rows, -1), "the source has other rows")
    return [kept if d == dim else n for d, n in enumerate(size)]


def view_rule(fact: Fact, op: OpOverload) -> Callable:
    """The rule of a view: it has one operand, and one result or a list of them."""
    place, resized = fact.place, bool(fact.sizes)
    method = getattr(Tensor, op_name(op), None)
    call = method if isinstance(method, MethodDescriptorType) else op  # a method of C's is called faster

    def rule(func, x, *args, **kwargs):
        dim = place(x, *args)
        if resized:
            args = (kept_size(x, args[0], dim),)
        out = call(x.payload, *args)
        return x.like(out, dim) if isinstance(out, Tensor) else [x.like(part, dim) for part in out]

    return rule


def derived_rule(fact: Fact) -> Callable:
    """The rule of any other op."""
    place, needs_batch, first, joined = fact.place, fact.needs_batch, fact.rows[0], fact.grads[1:]

    def rule(func, *args, **kwargs):
        ref = args[first]
        require(isinstance(ref, RowTensor), "this operand is expected to be the one of kept rows")
        dims = place(*args, **kwargs)
        if not isinstance(ref, RowSparseTensor):
            require(dims is not None and (isinstance(dims, int) or None not in dims), "rows are summed")
        elif joined:
            require(all(is_zeros(args[i]) for i in joined if i < len(args)), "a dense tensor is joined")
        if needs_batch is not None and needs_batch(*args, **kwargs):
            return run_on_batch(ref, func, args, kwargs, dims)
        kept = list(args)
        for i in fact.rows:
            if i < len(args) and isinstance(args[i], Tensor):
                kept[i] = ref.kept_rows(args[i])
        for i in fact.shared:
            if i < len(args):
                kept[i] = ref.kept_rows_or_broadcast(args[i], ref.row_dim - ref.ndim)
        for name in fact.shared_keywords:
            if name in kwargs:
                kwargs[name] = ref.kept_rows_or_broadcast(kwargs[name], ref.row_dim - ref.ndim)
        for i in fact.sizes:
            kept[i] = kept_size(ref, args[i], dims)
        return _with_rows(ref, func(*kept, **kwargs), dims)

    return rule


def run_on_batch(ref: RowTensor, func: OpOverload, args: tuple, kwargs: dict, dims: Any) -> Any:
    """
    The results of an op that has to see the whole batch: rows that are not kept are zeros in its operands, and those
    of its results are left out. Gradients are zero there, and in a forward op no row needs another one.
    """
    args, kwargs = tree_map_only(RowTensor, RowTensor.with_zeros, (args, kwargs))
    return _with_rows(ref, func(*args, **kwargs), dims, ref.kept_rows)


def _with_rows(ref: RowTensor, out: Any, dims: Any, payload: Callable[[Tensor, int], Tensor] = lambda x, _: x) -> Any:
    """The results of an op, with the rows of `ref` where the fact has them."""
    if isinstance(out, Tensor):
        return out if dims is None else ref.like(payload(out, dims), dims)
    if not isinstance(dims, tuple):
        dims = (dims,) * len(out)
    parts = [x if dim is None or x is None else ref.like(payload(x, dim), dim) for x, dim in zip_longest(out, dims)]
    return parts if isinstance(out, list) else tuple(parts)
