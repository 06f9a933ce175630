"""
Rules: how ATen's ops work on row-sparse gradients. This file holds the registry and the general families (pointwise,
views, reductions, matrix products, in-place ops); `rules_nn.py`, `rules_attention.py` and `rules_indexing.py` hold the
others.

A rule gets the op and its arguments and returns what the op returns. It must guarantee, for every input:

1. *Equality.* Whatever it returns stands for the tensor that the dense op would return on the densified arguments. An
   output may be row-sparse only if the dense one is zero outside the kept rows. (Zero times anything counts as zero:
   an infinite activation of a sample that is not kept does no harm.)
2. *Independence of rows.* The op is run on payloads only if each row of its output depends on the same row of its
   row-carrying operands; if rows are summed (weight gradients), the sum over the kept rows is the whole sum.
3. *Every operand accounted for.* A dense operand that has the gradient's rows is sliced with
   [`~hf_trim.backward.eager.tensor.RowTensor.kept_rows`]; one that is broadcast over them is left as it is; anything
   else raises [`~hf_trim.backward.eager.tensor.NotRowwiseError`]. `kept_rows` checks the size: a rule need only name
   the dimension.
4. *No guessing.* For modes that it does not fully understand (training-mode batch norm, a reduced loss, dropout inside
   a fused kernel) it raises `NotRowwiseError`: the op then runs on densified arguments, and is counted.

To add a rule for an op of one's own:

```python
from hf_trim.backward import implements


@implements(torch.ops.mylib.swish_backward.default)
def swish_backward(func, grad, x):
    return grad.like(func(grad.payload, grad.kept_rows(x)))
```
"""

from math import prod

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from hf_trim.backward.eager.tensor import NotRowwiseError, RowSparseTensor, RowTensor, densify, run_dense
from hf_trim.backward.registry import GRADIENTS, implements


aten = torch.ops.aten


def default_rule(func):
    """The rule of an op that has none of its own: by its tags and schema, else the fallback."""
    if func._schema.is_mutable:
        return in_place
    single = len(func._schema.returns) == 1 and str(func._schema.returns[0].type) == "Tensor"
    if single and (torch.Tag.pointwise in func.tags or func.overloadpacket.__name__ in POINTWISE):
        return pointwise
    return dense_rule


GRADIENTS.default = default_rule


def dense_rule(func, *args, **kwargs):
    return run_dense(func, args, kwargs, "No rule is registered.")


def require(condition, reason):
    if not condition:
        raise NotRowwiseError(reason)


def reference(args, kind=RowSparseTensor) -> RowTensor:
    """The operand whose rows and layout the others must share: the first row-sparse one."""
    for x in args:
        if isinstance(x, kind):
            return x
    raise NotRowwiseError("the row-sparse operand is passed by keyword")


def row_sparse(x):
    """`x` if it is row-sparse; the rule needs it to be."""
    require(isinstance(x, RowSparseTensor), "this operand is expected to be the row-sparse one")
    return x


def samples(x):
    """Rows must be samples, alone in the first dimension."""
    require((x.row_dim, x.row_outer, x.row_inner) == (0, 1, 1), "rows are not samples")


# ---- pointwise ---------------------------------------------------------------------------------------------------

# Ops whose result is zero wherever one of these operands is.
ZERO_IF_ZERO = {"mul": (0, 1), "div": (0,), "clone": (0,), "native_dropout_backward": (0,), "ldexp": (0,)}
# Backward ops that are pointwise without having the tag.
POINTWISE = {
    "_to_copy",
    "elu_backward",
    "hardsigmoid_backward",
    "hardswish_backward",
    "hardtanh_backward",
    "leaky_relu_backward",
    "log_sigmoid_backward",
    "mish_backward",
    "rrelu_with_noise_backward",
    "softplus_backward",
}
_zero_probes = {}


def _is_zero(x) -> bool:
    """Whether an operand is zero outside the kept rows: row-sparse, or a scalar zero."""
    if isinstance(x, RowSparseTensor):
        return True
    if isinstance(x, Tensor):
        return x.device.type == "cpu" and x.ndim == 0 and x.item() == 0
    return x == 0


def _keeps_zero(func, args, kwargs) -> bool:
    name = func.overloadpacket.__name__
    positions = ZERO_IF_ZERO.get(name)
    if positions:
        return isinstance(args[positions[0]], RowSparseTensor) or isinstance(args[positions[-1]], RowSparseTensor)
    if name.endswith("_backward"):  # linear in its first operand, the incoming gradient
        return isinstance(args[0], RowSparseTensor)
    if name == "where":
        return all(_is_zero(x) for x in args[1:])
    if name == "masked_fill":
        return isinstance(args[0], RowSparseTensor) and _is_zero(args[2])
    if name in ("addcmul", "addcdiv"):
        return isinstance(args[0], RowSparseTensor) and isinstance(args[1], RowSparseTensor)
    # Any other op of row-sparse operands and numbers: look what it makes of zeros.
    if any(isinstance(x, Tensor) and not isinstance(x, RowSparseTensor) for x in tree_iter((args, kwargs))):
        return False
    key = (func, repr([type(x) if isinstance(x, Tensor) else x for x in args]), repr(kwargs))
    if key not in _zero_probes:
        zeros = [torch.zeros((), dtype=x.dtype) if isinstance(x, Tensor) else x for x in args]
        _zero_probes[key] = func(*zeros, **kwargs).item() == 0
    return _zero_probes[key]


def pointwise(func, *args, **kwargs):
    """Elementwise ops with broadcasting, where zero rows stay zero."""
    ref = reference(args)
    require(_keeps_zero(func, args, kwargs), "the result is not zero outside the kept rows")
    return by_row(func, ref, args, kwargs)


def by_row(func, ref, args, kwargs):
    """Runs an elementwise op on the kept rows of its operands."""
    at = ref.row_dim - ref.ndim
    out = func(*payloads_of(ref, args, kwargs), **kwargs)
    require(out.shape[at] == ref.payload.shape[at], "rows are broadcast")
    return ref.like(out, at + out.ndim)


def payloads_of(ref, args, kwargs) -> list:
    """The arguments of an elementwise op, with the kept rows of its operands."""
    if kwargs:
        require(not any(isinstance(x, Tensor) for x in kwargs.values()), "a tensor passed by keyword")
        require(kwargs.get("device") in (None, ref.device), "another device")
    at = ref.row_dim - ref.ndim  # broadcasting aligns dimensions from the right
    return [
        x.payload if x is ref else ref.kept_rows_or_broadcast(x, at) if isinstance(x, Tensor) and x.ndim else x
        for x in args
    ]


@implements("_prelu_kernel_backward")
def prelu_backward(func, grad, x, weight):
    at = row_sparse(grad).row_dim - grad.ndim
    require(grad.shape == x.shape, "shapes differ")
    outs = func(grad.payload, grad.kept_rows(x, at), grad.kept_rows_or_broadcast(weight, at))
    return tuple(grad.like(out) for out in outs)


@implements("add.Tensor", "sub.Tensor")
def add(func, x, other, alpha=1):
    if isinstance(x, RowSparseTensor) and isinstance(other, RowSparseTensor):
        at = x.row_dim - x.ndim
        if (x.rows, x.row_outer, x.row_inner, at) == (
            other.rows,
            other.row_outer,
            other.row_inner,
            other.row_dim - other.ndim,
        ):
            out = func(x.payload, other.payload, alpha=alpha)
            return x.like(out, at + out.ndim)
        other = densify(other)  # gradients of two different selections: the sum is dense
    require(isinstance(x, Tensor) and isinstance(other, Tensor), "a number is added to every row")
    x, other = (each if isinstance(each, RowSparseTensor) else densify(each) for each in (x, other))
    require(x.shape == other.shape and x.dtype == other.dtype, "operands are broadcast")
    sign = -1 if func is aten.sub.Tensor else 1
    if isinstance(other, RowSparseTensor):
        return other.add_to(x.clone(), sign * alpha)
    return x.add_to(other * (sign * alpha))


@implements("add_.Tensor")
def add_(func, x, other, alpha=1):
    if isinstance(x, RowSparseTensor):
        return in_place(func, x, other, alpha=alpha)
    require(x.shape == other.shape and x.dtype == other.dtype, "operands are broadcast")
    return other.add_to(x, alpha)


# ---- in place ----------------------------------------------------------------------------------------------------


def in_place(func, *args, **kwargs):
    """In-place ops: the result of the functional op, written back."""
    name = func.overloadpacket.__name__
    functional = getattr(getattr(aten, name[:-1], None), func._overloadname, None) if name.endswith("_") else None
    if functional is None or not isinstance(args[0], Tensor):
        require(not isinstance(args[0], RowSparseTensor), "it changes its argument")
        return run_dense(func, args, kwargs, "It has no functional form.")
    out = functional(*args, **kwargs)
    return args[0].overwrite_(out) if isinstance(args[0], RowSparseTensor) else args[0].copy_(densify(out))


@implements("copy_", "copy")
def copy(func, x, source, non_blocking=False):
    require(isinstance(source, RowSparseTensor), "every row is overwritten")
    require(x.shape == source.shape and x.device == source.device, "operands are broadcast")
    out = source.like(source.payload.to(x.dtype, copy=True))
    if func is aten.copy.default:
        return out
    return x.overwrite_(out) if isinstance(x, RowSparseTensor) else out.add_to(x.zero_())


@implements("zero_")
def zero_(func, x):
    x.check_writable()
    x.payload.zero_()
    return x


# ---- factories ---------------------------------------------------------------------------------------------------


@implements("new_zeros", "zeros_like")
def zeros(func, x, size=None, memory_format=None, **kwargs):
    """Zeros are row-sparse with any rows; the gradient's own, where they fit, let a scatter into them stay sparse."""
    size = list(x.shape if size is None else size)
    options = {"dtype": kwargs.get("dtype") or x.dtype, "device": kwargs.get("device") or x.device}
    if x.row_dim < len(size) and size[x.row_dim] == x.shape[x.row_dim] and torch.device(options["device"]) == x.device:
        size[x.row_dim] = x.payload.shape[x.row_dim]
        return x.like(torch.zeros(size, **options))
    return torch.zeros(size, **options)


@implements("new_empty", "new_full", "new_ones", "empty_like", "full_like", "ones_like", "new_empty_strided")
@implements("rand_like", "randn_like")
def factory(func, x, *args, **kwargs):
    """Only shape, dtype and device of the gradient matter."""
    like = torch.empty_strided(x.shape, [0] * x.ndim, dtype=x.dtype, device=x.device)
    return func(like, *args, **kwargs)


@implements("is_same_size")
def is_same_size(func, x, other):
    return x.shape == other.shape


# ---- views -------------------------------------------------------------------------------------------------------


def as_view(source, out):
    """Marks a view, so that an in-place op that cannot reach its source is refused."""
    out.is_view = source.has_views = True
    out.is_copy = source.is_copy
    return out


@implements("alias", "detach")
def alias(func, x):
    return as_view(x, x.like(func(x.payload)))


@implements("view_as_real", "view_as_complex")
def view_as(func, x):
    require(func is aten.view_as_real.default or x.row_dim < x.ndim - 1, "rows are real and imaginary parts")
    return as_view(x, x.like(func(x.payload)))


@implements("lift_fresh")
def lift_fresh(func, x):
    return x


@implements("view", "_unsafe_view", "reshape", "_reshape_alias")
def view(func, x, size, stride=None):
    key = ("view", x.shape, x.row_dim, x.row_outer, x.row_inner, *size)
    plan = x.rows.plans.get(key)
    if plan is None:
        plan = x.rows.plans[key] = plan_view(x, list(size))
    size, *layout = plan
    out = type(x)(x.payload.reshape(size), x.rows, *layout)
    if func is not aten.view.default:
        return out
    as_view(x, out)
    if not x.payload.is_contiguous():  # the whole tensor has such a view, the payload may have been copied for it
        out.is_copy |= out.payload.untyped_storage().data_ptr() != x.payload.untyped_storage().data_ptr()
    return out


def plan_view(x, size):
    """Finds the dimension that the rows end in; a size that splits the rows themselves is not rowwise."""
    if -1 in size:
        size[size.index(-1)] = x.numel() // -prod(size)
    before, after = x.row_outer, x.row_inner  # what lies in front of the rows, and behind them, in memory order
    for n in x.shape[: x.row_dim]:
        before *= n
    for n in x.shape[x.row_dim + 1 :]:
        after *= n
    for dim, n in enumerate(size):
        if before and n >= before * x.rows.batch and n % (before * x.rows.batch) == 0:
            # The rows begin here. What is behind them may be split among this dimension and the following ones.
            inner = n // (before * x.rows.batch)
            if after % inner == 0:
                size[dim] = before * x.rows.count * inner
                return size, dim, before, inner
        if n == 0 or before % n:
            break
        before //= n
    raise NotRowwiseError(f"{size} splits the rows")


@implements("t", "transpose.int", "numpy_T", "mT", "swapaxes")
def transpose(func, x, dim0=0, dim1=1):
    if x.ndim < 2:
        return alias(aten.alias.default, x)
    dim0, dim1 = dim0 % x.ndim, dim1 % x.ndim
    dim = {dim0: dim1, dim1: dim0}.get(x.row_dim, x.row_dim)
    return as_view(x, x.like(x.payload.transpose(dim0, dim1), dim))


@implements("permute")
def permute(func, x, dims):
    dims = [d % x.ndim for d in dims]
    return as_view(x, x.like(x.payload.permute(dims), dims.index(x.row_dim)))


@implements("expand")
def expand(func, x, size, implicit=False):
    dim = x.row_dim + len(size) - x.ndim
    require(size[dim] in (-1, x.shape[x.row_dim]), "rows are repeated")
    size = [x.payload.shape[x.row_dim] if d == dim else n for d, n in enumerate(size)]
    return as_view(x, x.like(x.payload.expand(size), dim))


@implements("unsqueeze")
def unsqueeze(func, x, dim):
    dim %= x.ndim + 1
    return as_view(x, x.like(x.payload.unsqueeze(dim), x.row_dim + (dim <= x.row_dim)))


@implements("squeeze", "squeeze.dim", "squeeze.dims")
def squeeze(func, x, dim=None):
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    dims = [d % x.ndim for d in dims if x.shape[d] == 1 and d % x.ndim != x.row_dim]
    return as_view(x, x.like(x.payload.squeeze(dims), x.row_dim - sum(d < x.row_dim for d in dims)))


def other_dim(x, dim) -> int:
    """`dim` as a non-negative number; it must not be the one that carries rows."""
    dim %= x.ndim
    require(dim != x.row_dim, "it works along the rows")
    return dim


@implements("select.int")
def select(func, x, dim, index):
    dim = other_dim(x, dim)
    return as_view(x, x.like(x.payload.select(dim, index), x.row_dim - (dim < x.row_dim)))


@implements("slice.Tensor")
def slice_(func, x, dim=0, start=None, end=None, step=1):
    dim %= x.ndim
    if dim == x.row_dim:
        whole = (start is None or start == 0) and (end is None or end >= x.shape[dim]) and step == 1
        require(whole, "it works along the rows")
        return alias(aten.alias.default, x)
    return as_view(x, x.like(func(x.payload, dim, start, end, step)))


@implements(
    "split.Tensor", "split_with_sizes", "chunk", "tensor_split.sections", "unsafe_split.Tensor", "unsafe_chunk"
)
@implements("unsafe_split_with_sizes")
def split(func, x, sizes, dim=0):
    dim = other_dim(x, dim)
    return [as_view(x, x.like(part)) for part in func(x.payload, sizes, dim)]


@implements("unbind.int")
def unbind(func, x, dim=0):
    dim = other_dim(x, dim)
    return [as_view(x, x.like(part, x.row_dim - (dim < x.row_dim))) for part in x.payload.unbind(dim)]


@implements("unfold")
def unfold(func, x, dim, size, step):
    dim = other_dim(x, dim)
    return as_view(x, x.like(x.payload.unfold(dim, size, step)))


# ---- joining and moving ------------------------------------------------------------------------------------------


def _is_undefined(x, ref) -> bool:
    """Whether `x` is the zeros that autograd puts in place of an undefined gradient (looking at one if expanded)."""
    if x.ndim != ref.ndim:
        return False
    once = x[(0,) * x.ndim] if not any(x.stride()) else x
    return not once.any()


@implements("cat")
def cat(func, tensors, dim=0):
    ref = reference(tensors)
    dim = other_dim(ref, dim)
    payloads = []
    for x in tensors:
        if not isinstance(x, RowSparseTensor):
            require(_is_undefined(x, ref), "a dense tensor is joined")
        payloads.append(ref.kept_rows(x))
    return ref.like(func(payloads, dim))


@implements("stack")
def stack(func, tensors, dim=0):
    ref = reference(tensors)
    dim %= ref.ndim + 1
    for x in tensors:
        require(isinstance(x, RowSparseTensor) or _is_undefined(x, ref), "a dense tensor is joined")
    return ref.like(func([ref.kept_rows(x) for x in tensors], dim), ref.row_dim + (dim <= ref.row_dim))


@implements("roll")
def roll(func, x, shifts, dims=()):
    require(len(dims) > 0, "it works along the rows")
    return x.like(func(x.payload, shifts, [other_dim(x, d) for d in dims]))


@implements("flip")
def flip(func, x, dims):
    return x.like(func(x.payload, [other_dim(x, d) for d in dims]))


@implements("constant_pad_nd")
def constant_pad(func, x, pad, value=0):
    at = 2 * (x.ndim - 1 - x.row_dim)
    require(value == 0 and not any(pad[at : at + 2]), "it works along the rows")
    return x.like(func(x.payload, pad, value))


@implements("tril", "triu")
def triangle(func, x, diagonal=0):
    require(x.row_dim < x.ndim - 2, "it works along the rows")
    return x.like(func(x.payload, diagonal))


@implements("cumsum")
def cumsum(func, x, dim, dtype=None):
    return x.like(func(x.payload, other_dim(x, dim), dtype=dtype))


# ---- reductions --------------------------------------------------------------------------------------------------


def _reduced(x, dim):
    dims = range(x.ndim) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return [d % x.ndim for d in dims]


@implements("sum", "sum.dim_IntList", "mean", "mean.dim")
def sum_(func, x, dim=None, keepdim=False, dtype=None):
    """Sums over rows are complete without the rows that are zero; a mean divides by the logical count."""
    dims = _reduced(x, dim)
    if x.row_dim not in dims:
        rows_dim = x.row_dim if keepdim else x.row_dim - sum(d < x.row_dim for d in dims)
        return x.like(func(x.payload, dims, keepdim, dtype=dtype), rows_dim)
    out = x.payload.sum(dims, keepdim, dtype=dtype)
    if func in (aten.mean.default, aten.mean.dim):
        out /= prod(x.shape[d] for d in dims)
    return out


@implements("any", "all", "any.dim", "any.dims")
def any_(func, x, dim=None, keepdim=False):
    require(func is aten.any.default, "the result is not a plain tensor")
    return func(x.payload)


@implements("linalg_vector_norm")
def vector_norm(func, x, ord=2, dim=None, keepdim=False, dtype=None):
    dims = _reduced(x, dim)
    require(ord > 0 and x.row_dim in dims, "rows keep a norm of their own")
    return func(x.payload, ord, dims, keepdim, dtype=dtype)


# ---- matrix products ---------------------------------------------------------------------------------------------


@implements("mm", "bmm")
def matmul(func, a, b):
    """`[n, m] @ [m, p]`, with or without a batch dimension: rows along n or p stay, rows along m are summed."""
    first = 0 if func is aten.mm.default else 1  # where the matrix dimensions begin
    ref = a if isinstance(a, RowSparseTensor) else b
    if ref.row_dim < first:
        return ref.like(func(ref.kept_rows(a, 0), ref.kept_rows(b, 0)), 0)
    summed = first + 1 if ref is a else first
    if ref.row_dim == summed:
        return func(ref.kept_rows(a, first + 1), ref.kept_rows(b, first))
    require(not (isinstance(a, RowSparseTensor) and isinstance(b, RowSparseTensor)), "both operands carry rows apart")
    return ref.like(func(ref.payload, b) if ref is a else func(a, ref.payload))


@implements("addmm", "baddbmm")
def addmm(func, x, a, b, beta=1, alpha=1):
    """Rewritten as its parts, which have rules of their own."""
    product = torch.mm(a, b) if func is aten.addmm.default else torch.bmm(a, b)
    return x * beta + product * alpha


@implements("mv", "dot")
def product_with_vector(func, a, b):
    ref = a if isinstance(a, RowSparseTensor) else b
    if ref.row_dim == ref.ndim - 1:
        return func(ref.kept_rows(a, a.ndim - 1), ref.kept_rows(b, 0))
    return ref.like(func(row_sparse(a).payload, b), 0)
