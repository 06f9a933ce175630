"""
Forward ops on activations of which the kept rows are known (`checkpoint.py`, `saved.py`): elementwise ones
and random numbers. The rules of others follow from the facts.

What `rules/__init__.py` says of a rule holds here with one difference: the rows that are not kept are *unknown*, not
zero. A sum over rows is therefore never right; an elementwise op need not keep zeros. Random numbers are drawn for all
rows, and the kept rows of them are taken: they are then those of the forward pass.

e.g. `linear(x, weight)` with `x` `[B·T, H]`, B = 4, T = 2, rows 1 and 3 kept: `addmm` on the payload `[2·2, H]`.
`x.mean(0)` needs the rows that are unknown: `NotRowwiseError`.
"""

import torch

from hf_trim.backward._torch_internals import is_composite, is_mutable, return_types
from hf_trim.backward.eager.activation import ActivationRows
from hf_trim.backward.eager.rules.operands import find_reference, kept_payloads, run_by_row
from hf_trim.backward.eager.rules.pointwise import decomposed
from hf_trim.backward.facts.pointwise import is_pointwise
from hf_trim.backward.registry import ACTIVATIONS, NotRowwiseError, implements, require


def default_rule(op):
    """The rule of an op that has none of its own: elementwise if its tags say so, else none."""
    if is_composite(op):
        return decomposed
    if is_pointwise(op) and torch.Tag.nondeterministic_seeded not in op.tags and len(return_types(op)) == 1:
        return in_place if is_mutable(op) else pointwise
    return no_rule


ACTIVATIONS.default = default_rule


def no_rule(func, *args, **kwargs):
    raise NotRowwiseError(f"{func} has no forward rule")


def pointwise(func, *args, **kwargs):
    return run_by_row(func, find_reference(args, ActivationRows), args, kwargs)


def require_activation(x):
    """`x`, which must be the operand that carries rows."""
    require(isinstance(x, ActivationRows), "this operand is expected to be the one of kept rows")
    return x


@implements("fill_.Scalar", "zero_", "masked_fill_.Scalar", "masked_fill_.Tensor", table=ACTIVATIONS)
def in_place(func, x, *args, **kwargs):
    func(*kept_payloads(require_activation(x), (x, *args), kwargs), **kwargs)
    return x


# ---- random numbers ------------------------------------------------------------------------------------------------


def empty_batch(x):
    """
    An uninitialized tensor of the whole batch's shape and memory layout. The layout is a guess if one row is kept, and
    devices other than the CPU draw numbers in the order of memory.
    """
    require(x.device.type == "cpu" or x.payload.shape[x.row_dim] > 1, "the memory layout of one row is not known")
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


@implements("bernoulli_.float", "uniform_", "normal_", table=ACTIVATIONS)
def draw_in_place(func, x, *args, **kwargs):
    x.payload.copy_(x.kept_rows(func(empty_batch(x), *args, **kwargs)))
    return x


@implements("rand_like", "randn_like", table=ACTIVATIONS)
def draw_like(func, x, **kwargs):
    return x.like(x.kept_rows(func(empty_batch(x), **kwargs)))


@implements("native_dropout", table=ACTIVATIONS)
def native_dropout(func, x, p, train):
    scale, mask = (x.kept_rows(out) for out in func(empty_batch(x).fill_(1), p, train))
    return x.like(x.payload * scale), x.like(mask)
