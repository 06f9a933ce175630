"""
Proof rules that follow from facts (`hf_trim/backward/facts/`).

Example: `native_layer_norm_backward` of a gradient `[s0, 5, 16]`, zero outside of the kept rows. The fact says that
the gradient of the input has its rows in dimension 0, and that those of weight and bias are sums over the rows. So all
operands that carry rows must have them in dimension 0, weight and bias none, and the sums are complete.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import SymInt

from hf_trim.backward._compile_internals import size_expression
from hf_trim.backward._torch_internals import tree_map_only
from hf_trim.backward.compiled.values import (
    Value,
    Zeros,
    check_no_rows,
    check_same_dim,
    check_sum_over_rows,
    values_in,
    zeros_of,
)
from hf_trim.backward.facts import FACTS
from hf_trim.backward.facts.fact import Fact
from hf_trim.backward.registry import PROOF, overloads, require


def register_derived_rules() -> None:
    """Gives a rule to each op that has a fact, and none that is written by hand."""
    for name, fact in FACTS.items():
        packet = name.partition(".")[0]
        if packet not in PROOF.registered:
            PROOF.register(packet, derived_rule(fact, is_view=any(op.is_view for op in overloads(name))))


def derived_rule(fact: Fact, is_view: bool = False) -> Callable:
    """
    Args:
        fact ([`~hf_trim.backward.facts.fact.Fact`]): What is true of an op.
        is_view (`bool`, *optional*, defaults to `False`): Whether its result has the entries of its operand.

    Returns:
        `Callable`: Its proof rule.
    """
    of_rows = {*fact.rows, *fact.shared}

    def rule(prop, name: str, shapes: Any, *args: Any, **kwargs: Any) -> Value | list[Value]:
        zeros = min((zeros_of(args[i]) for i in fact.grads if i < len(args)), default=Zeros.UNKNOWN)
        if zeros == Zeros.EVERYWHERE:  # whatever the other operands are
            return _each(shapes, None, lambda shape, _: prop.uniform_result(shape, zeros))
        if all(value.row_dim is None for value in values_in((args, kwargs))):
            return _each(shapes, None, lambda shape, _: prop.result(shape, zeros=zeros))
        carriers = [args[i] for i in fact.rows if i < len(args) and isinstance(args[i], Value)]
        ref = carriers[0]
        shared = [args[i] for i in fact.shared if i < len(args)] + [kwargs.get(name) for name in fact.shared_keywords]
        shared = [value for value in values_in(shared) if value.row_dim is not None]
        check_same_dim(value.row_dim for value in carriers)
        check_same_dim(value.row_dim - value.ndim for value in [ref, *shared])
        check_no_rows(*(x for i, x in enumerate(args) if i not in of_rows))
        check_no_rows(*(x for key, x in kwargs.items() if key not in fact.shared_keywords))
        dims = fact.place(*tree_map_only(SymInt, size_expression, args), **kwargs)
        if not ((is_view or fact.sizes) and shapes == ref.shape):  # `x[:len(x)]` is all of x
            prop.check_no_batch_size([x for i, x in enumerate(args) if i not in fact.sizes], kwargs)
        layout = prop.common_layout([*carriers, *shared])
        if fact.needs_batch and fact.needs_batch(*args, **kwargs):
            _run_on_whole_batch(prop, fact, ref, dims, layout, kwargs)

        def result(shape: tuple, dim: int | None) -> Value:
            if dim is None:
                check_sum_over_rows(zeros)
            if not is_view:
                return prop.result(shape, dim, layout, zeros)
            out = prop.result(shape, dim, layout, zeros, ref.is_row_index)
            return replace(out, source=ref.source) if _real_sizes(shape) == _real_sizes(ref.shape) else out

        return _each(shapes, dims, result)

    return rule


def _run_on_whole_batch(prop, fact: Fact, ref: Value, dims: Any, layout: Value | None, kwargs: dict) -> None:
    """The op will run on the whole batch, if rows are where [`OnWholeBatch`] expects them."""
    is_first = ref.row_dim == dims == 0 and layout is not None and layout.outer == 1 and not any(values_in(kwargs))
    require(is_first, "it has to see the whole batch, and its rows are not in front")
    prop.whole_batch_ops[prop.op] = fact


def _real_sizes(shape: Iterable) -> list:
    return [size for size in shape if size != 1]


def _each(shapes: Any, dims: Any, result: Callable[[tuple, int | None], Value]) -> Value | list[Value]:
    """The results of an op that has one, or several. Those that are not asked for have no dimensions."""
    if not isinstance(shapes, list):
        return result(shapes, dims)
    if not isinstance(dims, tuple):
        dims = (dims,) * len(shapes)
    others = [Value(shape, unknown="a result that has no rows is used") for shape in shapes[len(dims) :]]
    return [result(shape, dim) if shape else Value(shape) for shape, dim in zip(shapes, dims, strict=False)] + others
