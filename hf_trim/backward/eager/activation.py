"""
Activations of which the kept rows are known and the others are not: what gradient checkpointing recomputes, and what
formulas of the backward pass read of a saved tensor. The rules for ops on them are in `rules/activations.py`.

e.g. hidden states `[B, T, C]` of B = 4 samples, rows 1 and 3 kept: the payload is `[2, T, C]`. `hidden.sin()` is
computed from it. `hidden.mean(0)` needs all four rows: `materialize` computes them, if there is a way.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from hf_trim.backward._torch_internals import OpOverload, is_mutable, tree_iter, tree_map_only
from hf_trim.backward.eager.rows import NotRowwiseError
from hf_trim.backward.eager.tensor import LostWriteError, RowSparseTensor, RowTensor, densify
from hf_trim.backward.registry import ACTIVATIONS


class ActivationRows(RowTensor):
    """
    An activation that is known in the kept rows only. Ops work on it if each row of the result depends on that row
    alone. Any other op needs all rows: `materialize` computes them. Without it, [`NotRowwiseError`] ends the
    recomputation.
    """

    materialize: Callable[[], Tensor] | None = None  # returns the ordinary tensor with all rows

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if RowSparseTensor in types:
            return NotImplemented  # a gradient's rules take activations as operands
        kwargs, rule = kwargs or {}, ACTIVATIONS[func]
        # Under checkpointing nothing is materialized: an op that mixes rows ends the recomputation.
        if not all(x.materialize for x in tree_iter((args, kwargs)) if isinstance(x, ActivationRows)):
            return rule(func, *args, **kwargs)
        if is_mutable(func):
            return run_in_place(rule, func, args, kwargs)
        try:
            out = rule(func, *args, **kwargs)
        except NotRowwiseError:
            return run_on_all_rows(func, args, kwargs)
        for position, x in enumerate(tree_iter(out)):
            if isinstance(x, ActivationRows):
                x.materialize = partial(output_with_all_rows, func, args, kwargs, position)
        return out

    def densify(self) -> Tensor:
        """The ordinary tensor of the same shape; its unknown rows are computed now."""
        if self.materialize is None:
            raise NotRowwiseError("the other rows are unknown")
        return self.materialize().resolve_conj().resolve_neg()  # rules run below the dispatch of these bits


def run_on_all_rows(func: OpOverload, args: tuple, kwargs: dict) -> Any:
    """Runs an op on all rows of its operands."""
    args, kwargs = tree_map_only(ActivationRows, densify, (args, kwargs))
    return func(*args, **kwargs)


def output_with_all_rows(func: OpOverload, args: tuple, kwargs: dict, position: int) -> Tensor:
    """One of the tensors that an op returns, with all rows."""
    return list(tree_iter(run_on_all_rows(func, args, kwargs)))[position]


def run_in_place(rule: Callable, func: OpOverload, args: tuple, kwargs: dict) -> Any:
    """Runs an op that changes its first argument, and all rows of it if they are asked for later."""
    target, *operands = args
    if not isinstance(target, ActivationRows):
        return run_on_all_rows(func, args, kwargs)
    before = target.materialize

    def materialize():
        # A copy: what `before` returns is another tensor's, or is asked for again.
        return run_on_all_rows(func, (before().clone(), *operands), kwargs)

    if target.is_shared():  # what shares its memory has a `materialize` that does not know of this op
        raise LostWriteError
    try:
        rule(func, *args, **kwargs)
    except NotRowwiseError:
        dense = materialize()
        target.densify_(dense)
        target.materialize = lambda: dense
    else:
        target.materialize = materialize
    return target
