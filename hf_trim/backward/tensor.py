"""A gradient that is zero outside the kept samples, as a tensor subclass: its logical shape is that of the whole
batch, its payload holds the kept rows only. The rules by which ATen's backward ops work on it are in `rules.py`."""

from collections import Counter, OrderedDict

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_iter, tree_map_only


RULES = {}
FALLBACKS = Counter()
_RECENT = 4  # slices that several ops share: a layer's input feeds up to three weight gradients and a norm
_SHARE_FROM = 1 << 16  # elements; smaller slices are copied faster than looked up


class NotRowwise(Exception):
    """A rule does not apply to these operands: the op runs dense instead."""


class Settings:
    """Switches of the engine, changed through [`~hf_trim.backward.sparse.strict`]."""

    strict = False


class Rows:
    """
    The kept rows of one backward pass. Gradients can be combined row by row if they share the same object.

    Args:
        index (`torch.Tensor`): `[k]` ascending row numbers, int64.
        batch (`int`): Number of rows B, kept or not.
    """

    def __init__(self, index: Tensor, batch: int):
        self.index, self.batch, self.count = index, batch, index.numel()
        # A run of neighbours is a view, not a copy. Asking a GPU for its ends would make the host wait.
        is_run = index.device.type == "cpu" and int(index[-1]) - int(index[0]) == self.count - 1
        self.start = int(index[0]) if is_run else None
        self._recent = OrderedDict()

    def take(self, x: Tensor, dim: int = 0, outer: int = 1, inner: int = 1) -> Tensor:
        """
        The kept rows of a dense tensor, in the memory layout of that tensor.

        Args:
            x (`torch.Tensor`): Has `outer * B * inner` entries along `dim`.
            dim (`int`): The dimension that carries rows.
            outer (`int`): Size of what was merged in front of the rows.
            inner (`int`): Size of what was merged behind the rows.

        Returns:
            `torch.Tensor`: The same shape but for `outer * k * inner` entries along `dim`; may be a view of `x`.

        Raises:
            `NotRowwise`: If `x` has another size along `dim`.
        """
        if not -x.ndim <= dim < x.ndim or x.shape[dim] != outer * self.batch * inner:
            raise NotRowwise(f"{tuple(x.shape)} has no {outer}*{self.batch}*{inner} rows along dimension {dim}")
        if x.is_contiguous():
            return self._take(x, dim % x.ndim, outer, inner)
        dim, strides = dim % x.ndim, x.stride()
        if strides[dim] == 0:
            return x.narrow(dim, 0, outer * self.count * inner)
        repeated = [d for d, stride in enumerate(strides) if stride == 0 and x.shape[d] > 1]
        if repeated:  # an expanded tensor: copy each entry once
            once = x
            for d in repeated:
                once = once.narrow(d, 0, 1)
            return self.take(once, dim, outer, inner).expand(
                *[outer * self.count * inner if d == dim else size for d, size in enumerate(x.shape)]
            )
        # Largest stride first: every permutation of one saved tensor is the same slice, taken once.
        order = sorted(range(x.ndim), key=lambda d: -strides[d])
        back = sorted(range(x.ndim), key=order.__getitem__)
        return self._take(x.permute(order), order.index(dim), outer, inner).permute(back)

    def _take(self, x: Tensor, dim: int, outer: int, inner: int) -> Tensor:
        if self.start is not None and outer == 1:
            return x.narrow(dim, self.start * inner, self.count * inner)
        if x.numel() < _SHARE_FROM:
            return self._copy(x, dim, outer, inner)
        storage = StorageWeakRef(x.untyped_storage())
        key = (storage.cdata, x._version, x.dtype, x.storage_offset(), x.shape, x.stride(), dim, outer, inner)
        found = self._recent.get(key)
        if found is not None and not found[0].expired():
            self._recent.move_to_end(key)
            return found[1]
        rows = self._copy(x, dim, outer, inner)
        self._recent[key] = (storage, rows)  # the weak reference keeps the address from being used again
        if len(self._recent) > _RECENT:
            self._recent.popitem(last=False)
        return rows

    def _copy(self, x: Tensor, dim: int, outer: int, inner: int) -> Tensor:
        if outer == inner == 1:
            return x.index_select(dim, self.index)
        before, after = x.shape[:dim], x.shape[dim + 1 :]
        if dim == 0 and outer == 1 and x.is_contiguous():  # whole rows, [B * inner, ...] as [B, inner * ...]
            rows = x.view(self.batch, -1).index_select(0, self.index)
            return rows.view(self.count * inner, *after)
        rows = x.view(*before, outer, self.batch, inner, *after).index_select(dim + 1, self.index)
        return rows.view(*before, outer * self.count * inner, *after)

    def add_to(self, out: Tensor, values: Tensor, dim: int, outer: int, inner: int, alpha=1) -> Tensor:
        """Adds a payload to a dense tensor, in place."""
        if outer == inner == 1:
            return out.index_add_(dim, self.index, values, alpha=alpha)
        split = out.unflatten(dim, (outer, self.batch, inner))
        split.index_add_(dim + 1, self.index, values.unflatten(dim, (outer, self.count, inner)), alpha=alpha)
        return out

    def put(self, out: Tensor, values: Tensor, dim: int, outer: int, inner: int) -> Tensor:
        """Writes a payload over the kept rows of a dense tensor, in place."""
        if outer == inner == 1:
            return out.index_copy_(dim, self.index, values)
        split = out.unflatten(dim, (outer, self.batch, inner))
        split.index_copy_(dim + 1, self.index, values.unflatten(dim, (outer, self.count, inner)))
        return out


def _dense_strides(values: Tensor, shape: list[int]) -> list[int]:
    """Strides for `shape` with the dimension order of `values`."""
    strides, step = [0] * len(shape), 1
    for d in sorted(range(len(shape)), key=lambda d: (values.stride(d), -d)):
        if values.stride(d) or values.shape[d] == 1:
            strides[d] = step
            step *= max(shape[d], 1)
    return strides


class RowSparseTensor(Tensor):
    """
    A gradient of logical shape `[..., outer * B * inner, ...]` that is zero outside the kept rows.

    Args:
        values (`torch.Tensor`): The kept rows, `[..., outer * k * inner, ...]`.
        rows ([`Rows`]): Which rows are kept.
        dim (`int`): The dimension that carries rows.
        outer (`int`): Size of what a view merged in front of the rows, as T in `[T * B, C]`.
        inner (`int`): Size of what a view merged behind the rows, as T in `[B * T, C]`.
    """

    is_view = has_views = False

    @staticmethod
    def __new__(cls, values: Tensor, rows: Rows, dim: int = 0, outer: int = 1, inner: int = 1):
        shape = list(values.shape)
        if shape[dim] != outer * rows.count * inner:
            raise AssertionError(f"payload {shape} does not hold {outer}*{rows.count}*{inner} rows along {dim}")
        shape[dim] = outer * rows.batch * inner
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            shape,
            strides=None if values.is_contiguous() else _dense_strides(values, shape),
            dtype=values.dtype,
            device=values.device,
        )
        self.values, self.rows, self.dim, self.outer, self.inner = values, rows, dim, outer, inner
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        rule = RULES.get(func)
        if rule is None:
            from hf_trim.backward.rules import find_rule

            rule = RULES[func] = find_rule(func)
        try:
            return rule(func, *args, **kwargs) if kwargs else rule(func, *args)
        except NotRowwise as reason:
            return run_dense(func, args, kwargs or {}, reason)

    def like(self, values: Tensor, dim: int | None = None) -> "RowSparseTensor":
        """The same rows with another payload, carried by dimension `dim` of it (default: the same dimension)."""
        return RowSparseTensor(values, self.rows, self.dim if dim is None else dim, self.outer, self.inner)

    def take(self, x, dim: int | None = None):
        """
        The payload-sized part of an operand that has this gradient's rows along `dim` (default: `self.dim`).

        Args:
            x (`torch.Tensor`, *optional*): A dense or row-sparse tensor, or `None`, which is handed back.
            dim (`int`, *optional*): The dimension of `x` that carries rows.

        Raises:
            `NotRowwise`: If `x` does not carry the same rows in the same way.
        """
        if dim is None:
            dim = self.dim
        if x is None:
            return None
        if isinstance(x, RowSparseTensor):
            if x is self and dim in (self.dim, self.dim - self.ndim):
                return x.values
            if (x.rows, x.dim, x.outer, x.inner) != (self.rows, dim % x.ndim, self.outer, self.inner):
                raise NotRowwise("operands carry different rows")
            return x.values
        return self.rows.take(x, dim, self.outer, self.inner)

    def take_or_broadcast(self, x, dim: int | None = None):
        """Like [`RowSparseTensor.take`], but an operand of size 1 along `dim`, or without it, is left as it is."""
        if isinstance(x, Tensor) and not isinstance(x, RowSparseTensor):
            dim = self.dim if dim is None else dim
            at = dim + x.ndim if dim < 0 else dim
            if at < 0 or x.shape[at] == 1:
                return x
        return self.take(x, dim)

    def densify(self) -> Tensor:
        """The ordinary tensor of the same shape."""
        if 0 in self.stride():
            out = self.values.new_zeros(self.shape)
        else:
            out = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device=self.device).zero_()
        return self.rows.put(out, self.values, self.dim, self.outer, self.inner)

    def sparsify(self, x):
        """A dense result made row-sparse again, if it turns out to be zero outside this gradient's rows."""
        fits = x.layout == torch.strided and self.dim < x.ndim and x.shape[self.dim] == self.shape[self.dim]
        if not fits or self.rows.count == self.rows.batch:
            return x
        values = self.take(x)
        return self.like(values) if values.count_nonzero() == x.count_nonzero() else x

    def add_to(self, out: Tensor, alpha=1) -> Tensor:
        """Adds the kept rows to a dense tensor of the same shape, in place."""
        return self.rows.add_to(out, self.values, self.dim, self.outer, self.inner, alpha)

    def become_dense(self, dense: Tensor):
        """Keeps this object, whose payload is from now on `dense`: every row of the first dimension is kept."""
        self.rows = Rows(torch.arange(self.shape[0], device=self.device), self.shape[0])
        self.values, self.dim, self.outer, self.inner = dense, 0, 1, 1
        return self

    def become(self, other: Tensor):
        """Takes over the content of `other`, which an in-place op computed."""
        if isinstance(other, RowSparseTensor) and (other.rows, other.dim, other.outer, other.inner, other.shape) == (
            self.rows,
            self.dim,
            self.outer,
            self.inner,
            self.shape,
        ):
            self.values.copy_(other.values)
            return self
        if self.is_view or self.has_views:
            raise RuntimeError(
                "This in-place operation would make a row-sparse gradient dense while views of it exist. "
                "Work on a copy of it: `gradient.clone()`."
            )
        dense = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device=self.device)
        return self.become_dense(dense.copy_(densify(other)))

    def __coerce_same_metadata_as_tangent__(self, expected_metadata, expected_type=None):
        return self.densify()  # a graph compiled by AOTAutograd knows ordinary tensors only

    def __tensor_flatten__(self):
        return ["values"], (self.rows, self.dim, self.outer, self.inner)

    @staticmethod
    def __tensor_unflatten__(inner_tensors, meta, outer_size, outer_stride):
        return RowSparseTensor(inner_tensors["values"], *meta)

    def __repr__(self, **kwargs):
        return (
            f"RowSparseTensor(shape={tuple(self.shape)}, kept={self.rows.count}, dim={self.dim}, dtype={self.dtype})"
        )

    # What reads memory directly rather than through an op.
    def numpy(self, **kwargs):
        return self.densify().numpy(**kwargs)

    def tolist(self):
        return self.densify().tolist()

    def data_ptr(self):
        raise RuntimeError("A row-sparse gradient has no memory of its logical shape; call `densify()` first.")

    def __reduce_ex__(self, protocol):
        return self.densify().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return self.densify()


def densify(x):
    """The ordinary tensor behind `x`; anything that is not row-sparse is handed back."""
    return x.densify() if isinstance(x, RowSparseTensor) else x


def run_dense(func, args, kwargs, reason=""):
    """Runs an op without a rule on ordinary tensors: always right, only slower."""
    name = str(func)
    if Settings.strict:
        shapes = [f"{type(x).__name__}{tuple(x.shape)}" for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        raise RuntimeError(f"{name} has no row-sparse rule for {', '.join(shapes)}. {reason}".rstrip())
    FALLBACKS[name] += 1
    if func.is_view and isinstance(args[0], RowSparseTensor):  # what is written to the view must reach its source
        return func(args[0].become_dense(args[0].densify()).values, *args[1:], **kwargs)
    ref = next(x for x in tree_iter((args, kwargs)) if isinstance(x, RowSparseTensor))
    args, kwargs = tree_map_only(RowSparseTensor, densify, (args, kwargs))
    out = func(*args, **kwargs)
    return out if func._schema.is_mutable else tree_map_only(Tensor, ref.sparsify, out)
