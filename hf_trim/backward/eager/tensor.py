"""
Tensor subclasses with the logical shape of the batch, of which the kept rows alone are in memory. `RowTensor` is what
gradients (`RowSparseTensor`) and activations (`ActivationRows`) have in common. Outside the kept rows a gradient is
zero, and an activation is unknown. The rules for ops on them are in `rules/`.

e.g. the gradient of a linear layer's output, [B·T, C] with B = 4 samples of T = 2 tokens, rows 1 and 3 kept: the
payload is [2·2, C], row_dim = 0, row_outer = 1, row_inner = 2. The weight's gradient is one product of the payload and
the kept rows of the layer's input.
"""

from typing import Any

import torch
from torch import Tensor

from hf_trim.backward._torch_internals import (
    OpOverload,
    disabled_torch_function,
    is_mutable,
    make_wrapper_subclass,
    tree_iter,
    tree_map_only,
)
from hf_trim.backward.eager.rows import NotRowwiseError, Rows
from hf_trim.backward.registry import GRADIENTS
from hf_trim.backward.settings import current_settings


def _dense_strides(values: Tensor, shape: list[int]) -> list[int]:
    """Strides for `shape` with the dimension order of `values`; what is expanded there, with stride 0, stays so."""
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

    payload: Tensor
    rows: Rows
    row_dim: int
    row_outer: int
    row_inner: int
    is_view = has_views = False
    is_copy = (
        False  # whether it stands for a view but has memory of its own: writing would not reach the viewed tensor
    )

    @staticmethod
    def __new__(cls, payload: Tensor, rows: Rows, row_dim: int = 0, row_outer: int = 1, row_inner: int = 1):
        if isinstance(payload, RowTensor):  # an op mixed two tensors of rows: payloads are ordinary ones
            raise NotRowwiseError("an operand carries rows of its own")
        shape, size = list(payload.shape), row_outer * rows.count * row_inner
        if shape[row_dim] != size:
            raise AssertionError(f"a payload of shape {shape} does not hold {size} rows along dimension {row_dim}")
        shape[row_dim] = row_outer * rows.batch * row_inner
        if payload.is_contiguous():
            self = make_wrapper_subclass(cls, shape, dtype=payload.dtype, device=payload.device)
        else:
            key = ("strides", payload.shape, payload.stride(), row_dim)
            strides = rows.plans.get(key)
            if strides is None:
                strides = rows.plans[key] = _dense_strides(payload, shape)
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

    def kept_rows(self, x: Tensor | None, dim: int | None = None) -> Any:
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

    def densify_(self, dense: Tensor) -> "RowTensor":
        """Makes this object dense: its payload is from now on `dense`, with every row of the first dimension kept."""
        self.check_writable(self.is_view or self.has_views)
        self.rows = Rows.all_of(self)
        self.payload, self.row_dim, self.row_outer, self.row_inner = dense, 0, 1, 1
        return self

    def check_writable(self, shared: bool = False) -> None:
        """
        Args:
            shared (`bool`, *optional*, defaults to `False`): Whether other tensors share the memory, but would not
                see what is written.

        Raises:
            `RuntimeError`: If an in-place op would change this tensor alone, and not those that share its memory.
        """
        if shared or self.is_copy:
            raise RuntimeError(
                "This in-place operation would change a tensor of kept rows, but not the tensors that share its "
                "memory (its views, or what it is a view of). Work on a copy of it: `x.clone()`."
            )

    def __repr__(self, **kwargs):
        fields = f"shape={tuple(self.shape)}, kept={self.rows.count}, row_dim={self.row_dim}, dtype={self.dtype}"
        return f"{type(self).__name__}({fields})"

    # These read memory directly rather than through an op, so that no rule meets them.
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
        if 0 in self.stride():  # an expanded tensor has less memory than entries to write to
            out = self.payload.new_zeros(self.shape)
        else:
            out = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device=self.device).zero_()
        return self.rows.put(out, self.payload, self.row_dim, self.row_outer, self.row_inner)

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
        return self.rows.add_to(out, self.payload, self.row_dim, self.row_outer, self.row_inner, alpha)

    def overwrite_(self, result: Tensor) -> RowTensor:
        """Takes over the content of `result`, which an in-place op computed."""
        self.check_writable()
        if isinstance(result, RowSparseTensor) and self.shape == result.shape:
            if self.layout_of_rows() == result.layout_of_rows():
                self.payload.copy_(result.payload)
                return self
        dense = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device=self.device)
        return self.densify_(dense.copy_(densify(result)))

    def __coerce_same_metadata_as_tangent__(self, expected_metadata, expected_type=None):
        return self.densify()  # a graph compiled by AOTAutograd knows ordinary tensors only

    def __tensor_flatten__(self):
        return ["payload"], self.layout_of_rows()

    @staticmethod
    def __tensor_unflatten__(inner_tensors, meta, outer_size, outer_stride):
        return RowSparseTensor(inner_tensors["payload"], *meta)


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
    grad = next(x for x in tree_iter((args, kwargs)) if isinstance(x, RowSparseTensor))
    args, kwargs = tree_map_only(RowTensor, densify, (args, kwargs))
    out = func(*args, **kwargs)
    return out if is_mutable(func) else tree_map_only(Tensor, grad.sparsify, out)


def run_dense_view(func: OpOverload, x: RowSparseTensor, *args, **kwargs) -> Any:
    """A view without a rule. What is written to it must reach `x`: that becomes dense, or writing is refused."""
    has_all_rows = x.rows.count == x.rows.batch
    is_dense = has_all_rows and x.payload.stride() == x.stride() and not x.payload.storage_offset()
    has_relatives = x.is_view or x.has_views
    if not x.is_copy and (is_dense or not has_relatives):
        if not is_dense:
            x.densify_(x.densify())
        x.has_views = True
        return func(x.payload, *args, **kwargs)

    def forbid_writing(view):
        if view.ndim == 0:  # a scalar has no rows to be marked by
            x.check_writable(shared=True)
        out = RowSparseTensor(view, Rows.all_of(view))
        out.is_copy = True
        return out

    return tree_map_only(Tensor, forbid_writing, func(x.densify(), *args, **kwargs))
