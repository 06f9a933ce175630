"""
Tensor subclasses with the logical shape of the batch, of which the kept rows alone are in memory. `RowTensor` is what
gradients (`RowSparseTensor`) and activations (`ActivationRows`) have in common. Outside the kept rows a gradient is
zero, and an activation is unknown. The rules for ops on them are in `rules/`.

e.g. the gradient of a linear layer's output, [B·T, C] with B = 4 samples of T = 2 tokens, rows 1 and 3 kept: the
payload is [2·2, C], row_dim = 0, row_outer = 1, row_inner = 2. The weight's gradient is one product of the payload and
the kept rows of the layer's input.
"""

from collections.abc import Callable
from contextlib import suppress
from operator import mul
from typing import Any

import torch
from torch import Tensor

from hf_trim.backward._torch_internals import (
    OpOverload,
    base_of,
    disabled_torch_function,
    is_mutable,
    make_wrapper_subclass,
    same_view,
    tensors_sharing_memory,
    tree_iter,
    tree_map_only,
    written_arguments,
)
from hf_trim.backward.eager.rows import NotRowwiseError, Rows
from hf_trim.backward.registry import GRADIENTS
from hf_trim.backward.settings import current_settings


class LostWriteError(RuntimeError):
    """Something would be written to one of several tensors that share memory, and not reach the others."""

    def __init__(self):
        super().__init__(
            "This in-place operation would change a tensor of kept rows, but not the tensors that share its memory "
            "(its views, or what it is a view of). Work on a copy of it: `x.clone()`."
        )


def _strides(payload: Tensor, shape: list[int], row_dim: int) -> list[int]:
    """Strides for `shape` with which a view of the whole is possible just where one of the payload is."""
    strides, step, count = list(payload.stride()), payload.stride(row_dim), payload.shape[row_dim]
    if count == 1 or not step:  # one row may have any stride: the rows are put outside of all else
        strides[row_dim] = max(map(mul, strides, payload.shape)) or 1
        return strides
    return [stride * shape[row_dim] // count if stride > step else stride for stride in strides]


def _read_by(name: str) -> Callable:
    return lambda self, *args, **kwargs: getattr(self.densify(), name)(*args, **kwargs)


def _written_by(name: str) -> Callable:
    return lambda self, *args, **kwargs: getattr(self.make_dense(), name)(*args, **kwargs)


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

    payload: Tensor
    rows: Rows
    row_dim: int
    row_outer: int
    row_inner: int

    @staticmethod
    def __new__(cls, payload: Tensor, rows: Rows, row_dim: int = 0, row_outer: int = 1, row_inner: int = 1):
        if isinstance(payload, RowTensor):  # an op mixed two tensors of rows: payloads are ordinary ones
            raise NotRowwiseError("an operand carries rows of its own")
        shape, size = list(payload.shape), row_outer * rows.count * row_inner
        if shape[row_dim] != size:
            raise NotRowwiseError(f"a payload of shape {shape} does not hold {size} rows along dimension {row_dim}")
        shape[row_dim] = row_outer * rows.batch * row_inner
        if payload.is_contiguous():
            self = make_wrapper_subclass(cls, shape, dtype=payload.dtype, device=payload.device)
        else:
            key = ("strides", payload.shape, payload.stride(), row_dim)
            strides = rows.plans.get(key)
            if strides is None:
                strides = rows.plans[key] = _strides(payload, shape, row_dim)
            self = make_wrapper_subclass(cls, shape, strides=strides, dtype=payload.dtype, device=payload.device)
        self.payload, self.rows = payload, rows
        self.row_dim, self.row_outer, self.row_inner = row_dim, row_outer, row_inner
        return self

    __torch_function__ = disabled_torch_function  # type: ignore[assignment]

    def layout_of_rows(self) -> tuple:
        """Which rows, and where they are: tensors for which this is equal can be combined row by row."""
        return self.rows, self.row_dim, self.row_outer, self.row_inner

    def like(self, payload: Tensor, row_dim: int | None = None) -> "RowTensor":
        """The same rows with another payload, carried by dimension `row_dim` of it (default: the same dimension)."""
        row_dim = self.row_dim if row_dim is None else row_dim
        return type(self)(payload, self.rows, row_dim, self.row_outer, self.row_inner)

    def kept_rows(self, x: Tensor | None, dim: int | None = None, inner: int | None = None) -> Any:
        """
        The payload-sized part of an operand that has this tensor's rows along `dim` (default: `self.row_dim`).

        Args:
            x (`torch.Tensor`, *optional*): An ordinary tensor, one of rows, or `None`, which is handed back.
            dim (`int`, *optional*): The dimension of `x` that carries rows.
            inner (`int`, *optional*): Size of what is merged behind the rows in `x` (default: `self.row_inner`).

        Raises:
            `NotRowwiseError`: If `x` does not carry the same rows in the same way.
        """
        if dim is None:
            dim = self.row_dim
        if x is None:
            return None
        if isinstance(x, RowTensor):
            if x is self and inner is None and dim in (self.row_dim, self.row_dim - self.ndim):
                return x.payload
            if x.layout_of_rows() != (self.rows, dim % x.ndim, self.row_outer, inner or self.row_inner):
                raise NotRowwiseError("operands carry different rows")
            return x.payload
        return self.rows.take(x, dim, self.row_outer, inner or self.row_inner)

    def kept_rows_or_broadcast(self, x: Tensor | None, dim: int | None = None) -> Any:
        """Like [`RowTensor.kept_rows`], but an operand of size 1 along `dim`, or without it, is left as it is."""
        if isinstance(x, Tensor) and not isinstance(x, RowTensor):
            dim = self.row_dim if dim is None else dim
            own_dim = dim + x.ndim if dim < 0 else dim
            if own_dim < 0 or x.shape[own_dim] == 1:
                return x
        return self.kept_rows(x, dim)

    def densify(self) -> Tensor:
        """The ordinary tensor of the same shape."""
        raise NotImplementedError

    def with_zeros(self) -> Tensor:
        """The same strides and kept rows, with zeros in the others, whatever they are: expanded if the payload is."""
        sizes, payload = list(self.shape), self.payload
        for dim, stride in enumerate(self.stride()):
            if stride == 0 and sizes[dim] > 1:
                sizes[dim], payload = 1, payload.narrow(dim, 0, 1)
        out = torch.empty_strided(sizes, self.stride(), dtype=self.dtype, device=self.device).zero_()
        out = self.rows.write(Tensor.index_copy_, out, payload, *self.layout_of_rows()[1:])
        return out if payload is self.payload else out.expand(self.shape)

    def densify_(self, dense: Tensor) -> Tensor:
        """Makes this object dense: its payload is from now on `dense`, with every row of the first dimension kept."""
        self.payload, self.rows = dense, Rows.all_of(dense)
        self.row_dim, self.row_outer, self.row_inner = 0, 1, 1
        return dense

    def make_dense(self) -> Tensor:
        """
        Makes this object dense, and the one that it is a view of.

        Returns:
            `torch.Tensor`: The payload with all rows: what is written to it, or to a view of it, is written to both.

        Raises:
            `LostWriteError`: If other tensors share the memory of the kept rows.
        """
        raise LostWriteError

    def is_shared(self, relatives: int = 0) -> bool:
        """Whether more than this many other tensors, views for example, share the payload's memory."""
        self.rows.forget_slice()  # it may be this payload
        return tensors_sharing_memory(self.payload) > 1 + relatives

    def __repr__(self, **kwargs):
        fields = f"shape={tuple(self.shape)}, kept={self.rows.count}, row_dim={self.row_dim}, dtype={self.dtype}"
        return f"{type(self).__name__}({fields})"

    # These use memory directly rather than through an op, so that no rule meets them.
    numpy, tolist = _read_by("numpy"), _read_by("tolist")
    __reduce_ex__, __deepcopy__ = _read_by("__reduce_ex__"), _read_by("__deepcopy__")
    data_ptr, untyped_storage = _written_by("data_ptr"), _written_by("untyped_storage")
    apply_, __dlpack__ = _written_by("apply_"), _written_by("__dlpack__")


class RowSparseTensor(RowTensor):
    """A gradient that is zero outside the kept rows."""

    # Each op of a backward pass comes through here, small ones too: it calls nothing but the rule.
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        rule = GRADIENTS[func]
        try:
            return rule(func, *args, **kwargs) if kwargs else rule(func, *args)
        except NotRowwiseError as reason:
            return run_dense(func, args, kwargs or {}, reason)

    def densify(self) -> Tensor:
        """The ordinary tensor of the same shape."""
        out = self.with_zeros()
        return out.contiguous() if 0 in self.stride() else out  # one that is expanded cannot be written to

    def sparsify(self, x: Tensor) -> Tensor:
        """A dense result made row-sparse again, if it turns out to be zero outside this gradient's rows."""
        if x.layout != torch.strided or x.is_nested or self.rows.count == self.rows.batch or self.row_dim >= x.ndim:
            return x
        if x.shape[self.row_dim] != self.shape[self.row_dim]:
            return x
        # As many entries that are not zero as in the kept rows: there are none elsewhere. (A GPU makes the host wait.)
        values = self.kept_rows(x)
        return self.like(values) if values.count_nonzero() == x.count_nonzero() else x

    def add_to(self, out: Tensor, alpha: float = 1) -> Tensor:
        """Adds the kept rows to a dense tensor of the same shape, in place."""
        return self.rows.write(Tensor.index_add_, out, self.payload, *self.layout_of_rows()[1:], alpha=alpha)

    def make_dense(self) -> Tensor:
        if not self.numel():
            return self.densify()  # nothing can be written
        if self.rows.start == 0 and self.rows.count == self.rows.batch:
            return self.payload
        base = base_of(self)
        if self.is_shared(relatives=0 if base is None else 1):
            raise LostWriteError
        if base is None:
            return self.densify_(self.densify())
        dense = base.densify()
        view = same_view(self, dense)
        # The strides of a tensor of one kept row are a guess: another view of this one need not be possible.
        if any(n > 1 and a != b for n, a, b in zip(self.shape, self.stride(), view.stride(), strict=True)):
            raise LostWriteError
        base.densify_(dense)
        return self.densify_(view)

    def overwrite_(self, result: Tensor) -> RowTensor:
        """Takes over the content of `result`, which an in-place op computed."""
        if isinstance(result, RowSparseTensor) and self.shape == result.shape:
            if self.layout_of_rows() == result.layout_of_rows():
                self.payload.copy_(result.payload)
                return self
        self.make_dense().copy_(densify(result))
        return self


def densify(x: Any) -> Any:
    """The ordinary tensor behind `x`; anything else is handed back."""
    return x.densify() if isinstance(x, RowTensor) else x


def run_dense(func: OpOverload, args: tuple, kwargs: dict, reason: str | Exception = "") -> Any:
    """Runs an op without a rule on ordinary tensors: always right, only slower."""
    name = str(func)
    settings = current_settings()
    if settings.strict:
        shapes = [f"{type(x).__name__}{tuple(x.shape)}" for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        raise RuntimeError(f"{name} has no row-sparse rule for {', '.join(shapes)}. {reason}".rstrip())
    settings.fallbacks[name] += 1
    if func.is_view and isinstance(args[0], RowSparseTensor):
        return run_dense_view(func, *args, **kwargs)
    tensors = {id(x): x for x in tree_iter((args, kwargs)) if isinstance(x, RowTensor)}
    dense = {key: x.densify() for key, x in tensors.items()}
    args, kwargs = tree_map_only(RowTensor, lambda x: dense[id(x)], (args, kwargs))
    out = func(*args, **kwargs)
    if not is_mutable(func):
        grad = next(x for x in tensors.values() if isinstance(x, RowSparseTensor))
        return tree_map_only(Tensor, grad.sparsify, out)
    written = {id(x) for x in tree_iter(written_arguments(func, args, kwargs))}
    changed: dict[int, Any] = {id(x): tensors[key] for key, x in dense.items() if id(x) in written}
    for x in changed.values():
        x.overwrite_(x.sparsify(dense[id(x)]))
    return tree_map_only(Tensor, lambda x: changed.get(id(x), x), out)


def run_dense_view(func: OpOverload, x: RowSparseTensor, *args, **kwargs) -> Any:
    """A view without a rule. What is written to it reaches `x`, which becomes dense; or it is refused."""
    # `as_strided` counts entries of the memory, in which a view has a place of its own.
    if func is not torch.ops.aten.as_strided.default or base_of(x) is None:
        with suppress(LostWriteError):
            return func(x.make_dense(), *args, **kwargs)
    return tree_map_only(Tensor, CopiedView, func(x.densify(), *args, **kwargs))


class CopiedView(RowTensor):
    """An ordinary tensor that stands for a view, but has memory of its own: writing to it is refused."""

    @staticmethod
    def __new__(cls, payload: Tensor):
        self = make_wrapper_subclass(
            cls, payload.shape, strides=payload.stride(), dtype=payload.dtype, device=payload.device
        )
        self.payload, self.rows = payload, Rows(torch.zeros(1, dtype=torch.long), 1)  # its own: no other has them
        self.row_dim, self.row_outer, self.row_inner = 0, 1, 1
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_mutable(func) and any(isinstance(x, cls) for x in tree_iter(written_arguments(func, args, kwargs))):
            raise LostWriteError
        args, kwargs = tree_map_only(cls, densify, (args, kwargs))
        out = func(*args, **kwargs)
        return tree_map_only(Tensor, cls, out) if func.is_view else out

    def densify(self) -> Tensor:
        """The ordinary tensor of the same shape."""
        return self.payload
