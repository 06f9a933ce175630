"""Tensor subclasses whose logical shape is that of the whole batch while their payload holds the kept rows only: a
gradient that is zero elsewhere, and an activation that is unknown elsewhere. The rules by which ATen's ops work on
them are in `rules.py`."""

from functools import partial

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_iter, tree_map_only

from hf_trim.backward.registry import ACTIVATIONS, GRADIENTS
from hf_trim.backward.settings import FALLBACKS, Settings


_SHARE_FROM = 1 << 16  # elements; smaller slices are copied faster than looked up
_wrapper = Tensor._make_wrapper_subclass


class NotRowwiseError(Exception):
    """A rule does not apply to these operands: the op runs dense instead."""


class Rows:
    """
    The kept rows of one backward pass. Gradients can be combined row by row if they share the same object.

    Args:
        index (`torch.Tensor`): `[k]` ascending row numbers, int64.
        batch (`int`): Number of rows B, kept or not.
    """

    mixing = False  # whether a checkpointed function could not be recomputed for these rows alone
    task = None  # the backward pass under way with them

    def __init__(self, index: Tensor, batch: int):
        self.index, self.batch, self.count = index, batch, index.numel()
        # A run of neighbours is a view, not a copy, but only in front: kernels take it for granted that what they
        # saved (means, say) has no gaps. Asking a GPU for its ends would make the host wait.
        is_run = index.device.type == "cpu" and int(index[-1]) - int(index[0]) == self.count - 1
        self.start = int(index[0]) if is_run else None
        self._last = None
        self.plans = {}  # of views: the sizes of a model's layers are the same again and again

    @classmethod
    def all_of(cls, x: Tensor) -> "Rows":
        """All rows of a tensor's first dimension."""
        return cls(torch.arange(x.shape[0], device=x.device), x.shape[0])

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
            `NotRowwiseError`: If `x` has another size along `dim`.
        """
        if not -x.ndim <= dim < x.ndim or x.shape[dim] != outer * self.batch * inner:
            raise NotRowwiseError(f"{tuple(x.shape)} has no {outer}*{self.batch}*{inner} rows along dimension {dim}")
        dim %= x.ndim
        if x.is_contiguous():
            return self._take(x, dim, outer, inner)
        strides = x.stride()
        if strides[dim] == 0:
            return x.narrow(dim, 0, outer * self.count * inner)
        key = ("order", x.shape, strides)
        plan = self.plans.get(key)
        if plan is None:
            repeated = [d for d, stride in enumerate(strides) if stride == 0 and x.shape[d] > 1]
            # Largest stride first: every permutation of one saved tensor is the same slice, taken once.
            order = sorted(range(x.ndim), key=lambda d: -strides[d])
            plan = self.plans[key] = repeated, order, sorted(range(x.ndim), key=order.__getitem__)
        repeated, order, back = plan
        if repeated:  # an expanded tensor: copy each entry once
            once = x
            for d in repeated:
                once = once.narrow(d, 0, 1)
            sizes = list(x.shape)
            sizes[dim] = outer * self.count * inner
            return self.take(once, dim, outer, inner).expand(sizes)
        return self._take(x.permute(order), order.index(dim), outer, inner).permute(back)

    def _take(self, x: Tensor, dim: int, outer: int, inner: int) -> Tensor:
        if self.start is not None and outer == 1 and x.shape[:dim].numel() == 1:
            return x.narrow(dim, self.start * inner, self.count * inner)
        if x.numel() < _SHARE_FROM:
            return self._copy(x, dim, outer, inner)
        # Several ops in a row want the same slice: a layer's input feeds up to three weight gradients. One slice is
        # remembered, for each costs memory. The weak reference keeps the storage's address from being used again.
        storage = StorageWeakRef(x.untyped_storage())
        key = (storage.cdata, x._version, x.dtype, x.storage_offset(), x.shape, x.stride(), dim, outer, inner)
        if self._last is None or self._last[0] != key or self._last[1].expired():
            self._last = None
            self._last = (key, storage, self._copy(x, dim, outer, inner))
        return self._last[2]

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


class RowTensor(Tensor):
    """
    A tensor of logical shape `[..., outer * B * inner, ...]` of which the kept rows are in memory.

    Args:
        payload (`torch.Tensor`): The kept rows, `[..., outer * k * inner, ...]`.
        rows ([`Rows`]): Which rows are kept.
        row_dim (`int`): The dimension that carries rows.
        row_outer (`int`): Size of what a view merged in front of the rows, as T in `[T * B, C]`.
        row_inner (`int`): Size of what a view merged behind the rows, as T in `[B * T, C]`.
    """

    is_view = has_views = False
    is_copy = False  # whether it stands for a view, but what is written to it would not reach what it views

    @staticmethod
    def __new__(cls, payload: Tensor, rows: Rows, row_dim: int = 0, row_outer: int = 1, row_inner: int = 1):
        if isinstance(payload, RowTensor):
            raise NotRowwiseError("an operand carries rows of its own")
        shape, size = list(payload.shape), row_outer * rows.count * row_inner
        if shape[row_dim] != size:
            raise AssertionError(f"a payload of shape {shape} does not hold {size} rows along dimension {row_dim}")
        shape[row_dim] = row_outer * rows.batch * row_inner
        if payload.is_contiguous():
            self = _wrapper(cls, shape, dtype=payload.dtype, device=payload.device)
        else:
            key = ("strides", payload.shape, payload.stride(), row_dim)
            strides = rows.plans.get(key)
            if strides is None:
                strides = rows.plans[key] = _dense_strides(payload, shape)
            self = _wrapper(cls, shape, strides=strides, dtype=payload.dtype, device=payload.device)
        self.payload, self.rows = payload, rows
        self.row_dim, self.row_outer, self.row_inner = row_dim, row_outer, row_inner
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    def layout_of_rows(self) -> tuple:
        """Which rows, and where they are: tensors for which this is equal can be combined row by row."""
        return self.rows, self.row_dim, self.row_outer, self.row_inner

    def like(self, payload: Tensor, row_dim: int | None = None) -> "RowTensor":
        """The same rows with another payload, carried by dimension `row_dim` of it (default: the same dimension)."""
        row_dim = self.row_dim if row_dim is None else row_dim
        return type(self)(payload, self.rows, row_dim, self.row_outer, self.row_inner)

    def kept_rows(self, x, dim: int | None = None):
        """
        The payload-sized part of an operand that has this tensor's rows along `dim` (default: `self.row_dim`).

        Args:
            x (`torch.Tensor`, *optional*): An ordinary tensor, one of rows, or `None`, which is handed back.
            dim (`int`, *optional*): The dimension of `x` that carries rows.

        Raises:
            `NotRowwiseError`: If `x` does not carry the same rows in the same way.
        """
        if dim is None:
            dim = self.row_dim
        if x is None:
            return None
        if isinstance(x, RowTensor):
            if x is self and dim in (self.row_dim, self.row_dim - self.ndim):
                return x.payload
            if x.layout_of_rows() != (self.rows, dim % x.ndim, self.row_outer, self.row_inner):
                raise NotRowwiseError("operands carry different rows")
            return x.payload
        return self.rows.take(x, dim, self.row_outer, self.row_inner)

    def kept_rows_or_broadcast(self, x, dim: int | None = None):
        """Like [`RowTensor.kept_rows`], but an operand of size 1 along `dim`, or without it, is left as it is."""
        if isinstance(x, Tensor) and not isinstance(x, RowTensor):
            dim = self.row_dim if dim is None else dim
            at = dim + x.ndim if dim < 0 else dim
            if at < 0 or x.shape[at] == 1:
                return x
        return self.kept_rows(x, dim)

    def densify(self) -> Tensor:
        """The ordinary tensor of the same shape."""
        raise NotImplementedError

    def densify_(self, dense: Tensor):
        """Keeps this object, whose payload is from now on `dense`: every row of the first dimension is kept."""
        self.check_writable(self.is_view or self.has_views)
        self.rows = Rows.all_of(self)
        self.payload, self.row_dim, self.row_outer, self.row_inner = dense, 0, 1, 1
        return self

    def check_writable(self, shared: bool = False):
        """Raises if what is written to this tensor would not reach what shares its memory."""
        if shared or self.is_copy:
            raise RuntimeError(
                "This in-place operation would change a tensor of kept rows, but not the views of it, or what it is a "
                "view of. Work on a copy of it: `x.clone()`."
            )

    def __repr__(self, **kwargs):
        about = f"shape={tuple(self.shape)}, kept={self.rows.count}, row_dim={self.row_dim}, dtype={self.dtype}"
        return f"{type(self).__name__}({about})"

    # What reads memory directly rather than through an op.
    def numpy(self, **kwargs):
        return self.densify().numpy(**kwargs)

    def tolist(self):
        return self.densify().tolist()

    def data_ptr(self):
        raise RuntimeError(f"A {type(self).__name__} has no memory of its logical shape; call `densify()` first.")

    def __reduce_ex__(self, protocol):
        return self.densify().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return self.densify()


class RowSparseTensor(RowTensor):
    """A gradient that is zero outside the kept rows."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        rule = GRADIENTS[func]
        try:
            return rule(func, *args, **kwargs) if kwargs else rule(func, *args)
        except NotRowwiseError as reason:
            return run_dense(func, args, kwargs or {}, reason)

    def densify(self) -> Tensor:
        """The ordinary tensor of the same shape."""
        if 0 in self.stride():
            out = self.payload.new_zeros(self.shape)
        else:
            out = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device=self.device).zero_()
        return self.rows.put(out, self.payload, self.row_dim, self.row_outer, self.row_inner)

    def sparsify(self, x):
        """A dense result made row-sparse again, if it turns out to be zero outside this gradient's rows."""
        if x.layout != torch.strided or self.rows.count == self.rows.batch or self.row_dim >= x.ndim:
            return x
        if x.shape[self.row_dim] != self.shape[self.row_dim]:
            return x
        values = self.kept_rows(x)
        return self.like(values) if values.count_nonzero() == x.count_nonzero() else x

    def add_to(self, out: Tensor, alpha=1) -> Tensor:
        """Adds the kept rows to a dense tensor of the same shape, in place."""
        return self.rows.add_to(out, self.payload, self.row_dim, self.row_outer, self.row_inner, alpha)

    def overwrite_(self, other: Tensor):
        """Takes over the content of `other`, which an in-place op computed."""
        self.check_writable()
        same = isinstance(other, RowSparseTensor) and self.layout_of_rows() == other.layout_of_rows()
        if same and self.shape == other.shape:
            self.payload.copy_(other.payload)
            return self
        dense = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device=self.device)
        return self.densify_(dense.copy_(densify(other)))

    def __coerce_same_metadata_as_tangent__(self, expected_metadata, expected_type=None):
        return self.densify()  # a graph compiled by AOTAutograd knows ordinary tensors only

    def __tensor_flatten__(self):
        return ["payload"], self.layout_of_rows()

    @staticmethod
    def __tensor_unflatten__(inner_tensors, meta, outer_size, outer_stride):
        return RowSparseTensor(inner_tensors["payload"], *meta)


class ActivationRows(RowTensor):
    """
    An activation that is known in the kept rows only, recomputed for them (`checkpoint.py`). Ops work on it if each
    row of the result depends on that row alone. Anything else needs the other rows: `whole`, if there is one, finds
    them out, else [`NotRowwiseError`] ends the recomputation.
    """

    whole = None  # `Callable` that returns the ordinary tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if RowSparseTensor in types:
            return NotImplemented  # a gradient's rules take activations as operands
        kwargs, rule = kwargs or {}, ACTIVATIONS[func]
        if not all(x.whole for x in tree_iter((args, kwargs)) if isinstance(x, ActivationRows)):
            return rule(func, *args, **kwargs)
        if func._schema.is_mutable:
            return change(rule, func, args, kwargs)
        try:
            out = rule(func, *args, **kwargs)
        except NotRowwiseError:
            return run_whole(func, args, kwargs)
        for position, x in enumerate(tree_iter(out)):
            if isinstance(x, ActivationRows):
                x.whole = partial(whole_output, func, args, kwargs, position)
        return out

    def densify(self) -> Tensor:
        """The ordinary tensor of the same shape; the other rows are computed now."""
        if self.whole is None:
            raise NotRowwiseError("the other rows are unknown")
        return self.whole()


def run_whole(func, args, kwargs):
    """Runs an op on all rows of its operands."""
    args, kwargs = tree_map_only(ActivationRows, densify, (args, kwargs))
    return func(*args, **kwargs)


def whole_output(func, args, kwargs, position):
    """One of the tensors that an op returns, with all rows."""
    return list(tree_iter(run_whole(func, args, kwargs)))[position]


def change(rule, func, args, kwargs):
    """Runs an op that changes its first argument."""
    changed, *others = args
    if not isinstance(changed, ActivationRows):
        return run_whole(func, args, kwargs)
    before = changed.whole

    def whole():
        return run_whole(func, (before().clone(), *others), kwargs)

    try:
        rule(func, *args, **kwargs)
    except NotRowwiseError:
        dense = whole()
        changed.densify_(dense)
        changed.whole = lambda: dense
    else:
        changed.whole = whole
    return changed


def densify(x):
    """The ordinary tensor behind `x`; anything else is handed back."""
    return x.densify() if isinstance(x, RowTensor) else x


def view_dense(func, x, *args, **kwargs):
    """A view without a rule. What is written to it must reach `x`: that becomes dense, or writing is refused."""
    whole = x.rows.count == x.rows.batch and x.payload.stride() == x.stride() and not x.payload.storage_offset()
    alone = not (x.is_view or x.has_views)
    if not x.is_copy and (whole or alone):
        if not whole:
            x.densify_(x.densify())
        x.has_views = True
        return func(x.payload, *args, **kwargs)

    def unwritable(view):
        if view.ndim == 0:
            x.check_writable(shared=True)
        out = RowSparseTensor(view, Rows.all_of(view))
        out.is_copy = True
        return out

    return tree_map_only(Tensor, unwritable, func(x.densify(), *args, **kwargs))


def run_dense(func, args, kwargs, reason=""):
    """Runs an op without a rule on ordinary tensors: always right, only slower."""
    name = str(func)
    if Settings.strict:
        shapes = [f"{type(x).__name__}{tuple(x.shape)}" for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        raise RuntimeError(f"{name} has no row-sparse rule for {', '.join(shapes)}. {reason}".rstrip())
    FALLBACKS[name] += 1
    if func.is_view and isinstance(args[0], RowSparseTensor):
        return view_dense(func, *args, **kwargs)
    ref = next(x for x in tree_iter((args, kwargs)) if isinstance(x, RowSparseTensor))
    args, kwargs = tree_map_only(RowTensor, densify, (args, kwargs))
    out = func(*args, **kwargs)
    return out if func._schema.is_mutable else tree_map_only(Tensor, ref.sparsify, out)
