"""
Elementwise ops, in-place ops and factories; and the rule of an op that has none of its own.

e.g. `grad * mask`, both `[B·T, C]`, B = 4, T = 2, rows 1 and 3 kept: the payload `[2·2, C]` times the kept rows of the
mask, with the rows where they were. `grad + 1` is not zero outside the kept rows: it runs dense.
"""

import torch
from torch import Tensor

from hf_trim.backward import waiting
from hf_trim.backward._torch_internals import (
    decompose,
    functional_form,
    is_composite,
    is_mutable,
    op_name,
    return_types,
    tree_iter,
)
from hf_trim.backward.eager.rules.operands import find_reference, run_by_row
from hf_trim.backward.eager.tensor import RowSparseTensor, densify, run_dense
from hf_trim.backward.facts.pointwise import is_pointwise, keeps_zeros, zero_where
from hf_trim.backward.registry import ACTIVATIONS, GRADIENTS, implements, require


aten = torch.ops.aten

# ---- ops without a rule of their own -----------------------------------------------------------------------------


def default_rule(op):
    """The rule of an op that has none of its own: by its tags and schema, else the dense one."""
    if is_composite(op):
        return decomposed
    if is_mutable(op):
        return in_place
    return pointwise_rule(op) if is_pointwise(op) and return_types(op) == ["Tensor"] else dense_rule


GRADIENTS.default = default_rule


def dense_rule(func, *args, **kwargs):
    return run_dense(func, args, kwargs, "No rule is registered.")


def decomposed(func, *args, **kwargs):
    """The ops that `func` is made of have rules: autograd usually decomposes it; inference mode does not."""
    return decompose(func, *args, **kwargs)


# ---- pointwise ---------------------------------------------------------------------------------------------------


def _is_zero(x) -> bool:
    """Whether an operand is zero outside the kept rows: row-sparse, or a scalar zero."""
    if isinstance(x, RowSparseTensor):
        return True
    if isinstance(x, Tensor):
        return x.ndim == 0 and waiting.reads_freely(x.device) and x.item() == 0
    return x == 0


def _is_zero_outside(terms: tuple, args: tuple) -> bool:
    """Whether in each term there is an operand that is zero outside the kept rows."""
    for term in terms:
        for i in term:
            if _is_zero(args[i]):
                break
        else:
            return False
    return True


def pointwise_rule(op):
    """The rule of an elementwise op with broadcasting, where zero rows stay zero."""
    terms = zero_where(op_name(op))

    def pointwise(func, *args, **kwargs):
        ref = find_reference(args)
        if terms is not None:
            is_zero = _is_zero_outside(terms, args)
        else:
            tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
            is_zero = all(isinstance(x, RowSparseTensor) for x in tensors)
            is_zero = is_zero and keeps_zeros(func, args, kwargs, RowSparseTensor)
        require(is_zero, "the result is not zero outside the kept rows")
        return run_by_row(func, ref, args, kwargs)

    return pointwise


@implements("_conj", "_neg_view", table=(GRADIENTS, ACTIVATIONS))
def resolved(func, x):
    """Lazy conjugates and negatives: a payload has no such bit, as it would be ignored below the dispatch."""
    return x.like(x.payload.conj_physical() if func is aten._conj.default else x.payload.neg())


@implements("add.Tensor", "sub.Tensor")
def add(func, x, y, alpha=1):
    if isinstance(x, RowSparseTensor) and isinstance(y, RowSparseTensor):
        dim = x.row_dim - x.ndim
        layout = (y.rows, y.row_outer, y.row_inner, y.row_dim - y.ndim)
        if (x.rows, x.row_outer, x.row_inner, dim) == layout:
            out = func(x.payload, y.payload, alpha=alpha)
            return x.like(out, dim + out.ndim)
        y = densify(y)  # gradients of two different selections: the sum is dense
    require(isinstance(x, Tensor) and isinstance(y, Tensor), "a number is added to every row")
    x, y = (operand if isinstance(operand, RowSparseTensor) else densify(operand) for operand in (x, y))
    require(x.shape == y.shape and x.dtype == y.dtype, "operands are broadcast")
    sign = -1 if func is aten.sub.Tensor else 1
    if isinstance(y, RowSparseTensor):
        return y.add_to(x.clone(), sign * alpha)
    return x.add_to(y * (sign * alpha))


@implements("add_.Tensor")
def add_(func, x, y, alpha=1):
    if isinstance(x, RowSparseTensor):
        return in_place(func, x, y, alpha=alpha)
    require(x.shape == y.shape and x.dtype == y.dtype, "operands are broadcast")
    return y.add_to(x, alpha)


# ---- in place ----------------------------------------------------------------------------------------------------


def in_place(func, *args, **kwargs):
    """In-place ops: the result of the functional op, written back."""
    target, functional = args[0], functional_form(func)
    if functional is None or not isinstance(target, Tensor):
        return run_dense(func, args, kwargs, "It has no functional form.")
    out = functional(*args, **kwargs)
    return target.overwrite_(out) if isinstance(target, RowSparseTensor) else target.copy_(densify(out))


@implements("copy_", "copy")
def copy(func, x, source, non_blocking=False):
    require(isinstance(source, RowSparseTensor), "every row is overwritten")
    require(x.shape == source.shape, "operands are broadcast")
    require(not (x.is_conj() or x.is_neg()), "it writes to a lazy conjugate")
    if func is aten.copy.default:
        return source.like(source.payload.to(x.device, x.dtype, copy=True))
    if isinstance(x, RowSparseTensor):
        return x.overwrite_(source)
    return source.like(source.payload.to(x.device, x.dtype)).add_to(x.zero_())


@implements("zero_")
def zero_(func, x):
    x.payload.zero_()
    return x


# ---- factories ---------------------------------------------------------------------------------------------------


@implements("new_zeros", "zeros_like")
def zeros(func, x, size=None, memory_format=None, **kwargs):
    """
    Zeros are row-sparse with any rows; the gradient's own, where they fit, or those of the batch let what is written
    into them stay sparse.
    """
    size = list(x.shape if size is None else size)
    options = {"dtype": kwargs.get("dtype") or x.dtype, "device": kwargs.get("device") or x.device}
    if torch.device(options["device"]) == x.device:
        if x.row_dim < len(size) and size[x.row_dim] == x.shape[x.row_dim]:
            size[x.row_dim] = x.payload.shape[x.row_dim]
            return x.like(waiting.zeros(size, **options))
        rows = x.rows.origin or x.rows
        for dim in (x.row_dim, 0):
            if dim < len(size) and size[dim] % rows.batch == 0 < size[dim]:
                inner = size[dim] // rows.batch
                size[dim] = inner * rows.count
                return RowSparseTensor(waiting.zeros(size, **options), rows, dim, 1, inner)
    return torch.zeros(size, **options)


@implements("new_empty", "new_full", "new_ones", table=(GRADIENTS, ACTIVATIONS))
@implements("empty_like", "full_like", "ones_like", "rand_like", "randn_like")
@implements("new_zeros", table=ACTIVATIONS)
def factory(func, x, *args, **kwargs):
    """Only shape, dtype and device of the gradient matter."""
    like = torch.empty_strided(x.shape, [0] * x.ndim, dtype=x.dtype, device=x.device)
    return func(like, *args, **kwargs)


@implements("is_same_size")
def is_same_size(func, x, y):
    return x.shape == y.shape
