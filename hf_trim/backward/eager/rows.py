"""
The kept rows of a batch, and how they are read from tensors and written to them.

e.g. rows 1 and 3 of B = 4 samples with T = 2 tokens each: `Rows(torch.tensor([1, 3]), 4)`. In `[B·T, C]` each row has
`inner = T` entries side by side, and `take(x, dim=0, inner=2)` returns entries 2, 3, 6 and 7 of `x`, `[2·2, C]`. In
`[T·B, C]` the rows come `outer = T` times one after the other, and `take(x, dim=0, outer=2)` returns entries 1, 3, 5
and 7.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from hf_trim.backward import waiting
from hf_trim.backward._torch_internals import StorageWeakRef, negative_view, version_of
from hf_trim.backward.registry import NotRowwiseError


_REMEMBER_FROM = 1 << 16  # elements; smaller slices are copied faster than looked up


def extent(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Number of entries in memory from the first to the last one of a tensor."""
    return 1 + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))


def _padded(x: Tensor, order: list[int]) -> tuple[int, int] | None:
    """
    The innermost dimension, and its size with the padding, where a tensor is padded in memory so that kernels can read
    it in pieces of 8 entries, as a mask of `[B, 1, 13, 13]` with strides `(208, 208, 16, 1)` is.
    """
    dims = [d for d in order if x.shape[d] > 1]
    if len(dims) < 2 or x.stride(dims[-1]) != 1:
        return None
    before, last = dims[-2:]
    size, width = x.shape[last], x.stride(before)
    return (last, width) if size < width < size + 8 and width % 8 == 0 else None


class Rows:
    """
    The kept rows of one backward pass. Gradients can be combined row by row if they share the same object.

    Args:
        index (`torch.Tensor`): `[k]` different row numbers in any order, int64: payloads have the rows in this order.
        batch (`int`): Number of rows B, kept or not.
        may_be_run (`bool`, *optional*, defaults to `True`): Whether neighbours are looked for. A tape holds for any
            kept rows, and so for none in particular.
    """

    needs_all_rows = False  # whether a checkpointed function could not be recomputed for these rows alone
    starts_dense = False  # whether the first gradients are ordinary ones
    backward_pass: int | None = None  # the number of the one under way with them
    origin: "Rows | None" = None  # those of the batch, if these are entries chosen from them

    def __init__(self, index: Tensor, batch: int, may_be_run: bool = True):
        self.index, self.batch, self.count = index, batch, index.numel()
        # A run of neighbours is a view, not a copy, but only in front: kernels take it for granted that what they
        # saved (means, say) has no gaps. On a GPU, to read its ends would make the host wait.
        is_run = (
            may_be_run
            and waiting.reads_freely(index.device)
            and int(index[-1]) - int(index[0]) == self.count - 1
            and bool((index.diff() == 1).all())
        )
        self.start = int(index[0]) if is_run else None
        self._last: tuple | None = None  # the slice that was taken last: its key, its source's storage, and the slice
        # Of views and slices: the sizes of a model's layers are the same again and again.
        self.plans: dict[tuple, Any] = {}
        self.chosen: WeakSet[Rows] = WeakSet()  # those whose origin these are

    @classmethod
    def all_of(cls, x: Tensor) -> "Rows":
        """All rows of a tensor's first dimension."""
        rows = cls(torch.arange(x.shape[0], device=x.device), x.shape[0])
        rows.start = 0
        return rows

    def index_on(self, device: torch.device) -> Tensor:
        """The row numbers on a device: a model may have its layers on several."""
        if device == self.index.device:
            return self.index
        key = ("index", device)
        if key not in self.plans:
            self.plans[key] = self.index.to(device)
        return self.plans[key]

    def entries(self, inner: int, device: torch.device) -> Tensor:
        """The numbers of all entries in a dimension that has `inner` of them in each row."""
        key = ("entries", inner, device)
        if key not in self.plans:
            index = self.index_on(device)
            if inner > 1:
                index = (index.unsqueeze(1) * inner + torch.arange(inner, device=device)).flatten()
            self.plans[key] = index
        return self.plans[key]

    def places(self, outer: int, inner: int, device: torch.device) -> Tensor:
        """Where each of the `outer * B * inner` entries of a dimension is in a payload; −1 if it is not kept."""
        key = ("places", outer, inner, device)
        if key not in self.plans:
            entries = torch.arange(outer * self.batch * inner, device=device)
            kept = self.take(entries, 0, outer, inner)
            self.plans[key] = torch.full_like(entries, -1).index_copy_(0, kept, entries[: len(kept)])
        return self.plans[key]

    def of_entries(self, chosen: Tensor) -> tuple["Rows", int]:
        """
        Rows for a dimension whose entries come from these rows, as the tokens that are sent to an expert do.

        Args:
            chosen (`torch.Tensor`): `[n]`, whether each entry of the dimension does. The others are zero.

        Returns:
            `tuple`: Rows, and how many entries each has. Those of the batch if they hold the entries; else the entries
            themselves in ascending order, and the same object for the same ones, so that gradients can be added up.
        """
        origin, size = self.origin or self, len(chosen)
        inner = size // origin.batch
        outside = chosen & (origin.places(1, inner, chosen.device) < 0) if inner * origin.batch == size else chosen
        # On a GPU the host waits here: once, for both numbers.
        count, num_outside = divmod(int(chosen.sum() * (size + 1) + outside.sum()), size + 1)
        if not num_outside and inner * origin.batch == size:
            return origin, inner
        # There are no tensors without rows: one of zeros stands for none.
        entries = chosen.nonzero_static(size=max(1, count), fill_value=0).flatten()
        for rows in origin.chosen:
            if (rows.batch, rows.count) == (size, len(entries)) and torch.equal(rows.index_on(chosen.device), entries):
                return rows, 1
        rows = Rows(entries, size)
        rows.origin = origin
        origin.chosen.add(rows)
        return rows, 1

    def take(self, x: Tensor, dim: int = 0, outer: int = 1, inner: int = 1) -> Tensor:
        """
        The kept rows of a dense tensor, in the memory layout of that tensor. Rules run below the dispatch of lazy
        conjugates and negatives, where most ops ignore these bits: they are resolved here.

        Args:
            x (`torch.Tensor`): Has `outer * B * inner` entries along `dim`.
            dim (`int`): The dimension that carries rows.
            outer (`int`): Size of what was merged in front of the rows.
            inner (`int`): Size of what was merged behind the rows.

        Returns:
            `torch.Tensor`: The same shape but for `outer * k * inner` entries along `dim`; may be a view of `x`.

        Raises:
            `NotRowwiseError`: If `x` has another size along `dim`, or is sparse or nested.
        """
        if x.layout is not torch.strided or x.is_nested:
            raise NotRowwiseError("an operand is sparse or nested")
        if x.is_neg():  # real tensors may be negatives too: the imaginary part of a conjugate is one
            return self.take(negative_view(x), dim, outer, inner).neg()
        if x.is_conj():
            return self.take(x.conj(), dim, outer, inner).conj_physical()
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
            plan = self.plans[key] = repeated, order, sorted(range(x.ndim), key=order.__getitem__), _padded(x, order)
        repeated, order, back, padded = plan
        if repeated:  # an expanded tensor: copy each entry once
            once = x
            for d in repeated:
                once = once.narrow(d, 0, 1)
            sizes = list(x.shape)
            sizes[dim] = outer * self.count * inner
            return self.take(once, dim, outer, inner).expand(sizes)
        if padded is not None and padded[0] != dim:
            d, width = padded
            sizes = [width if i == d else n for i, n in enumerate(x.shape)]
            if x.storage_offset() + extent(sizes, strides) <= x.untyped_storage().nbytes() // x.element_size():
                return self.take(x.as_strided(sizes, strides), dim, outer, inner).narrow(d, 0, x.shape[d])
        return self._take(x.permute(order), order.index(dim), outer, inner).permute(back)

    def _take(self, x: Tensor, dim: int, outer: int, inner: int) -> Tensor:
        if self.start is not None and outer == 1 and x.shape[:dim].numel() == 1:
            return x.narrow(dim, self.start * inner, self.count * inner)
        if x.numel() < _REMEMBER_FROM:
            return self._copy(x, dim, outer, inner)
        # Several ops in a row want the same slice: a layer's input feeds up to three weight gradients. One slice is
        # remembered, for each costs memory. The weak reference keeps the storage's address from being used again.
        storage = StorageWeakRef(x.untyped_storage())
        key = (storage.cdata, version_of(x), x.dtype, x.storage_offset(), x.shape, x.stride(), dim, outer, inner)
        if self._last is None or self._last[0] != key or self._last[1].expired():
            self._last = None  # frees the old slice before the new one is made
            self._last = (key, storage, self._copy(x, dim, outer, inner))
        return self._last[2]

    def forget_slice(self) -> None:
        """Has the next `take` copy anew: somebody may write to the slice that was taken last."""
        self._last = None

    def _copy(self, x: Tensor, dim: int, outer: int, inner: int) -> Tensor:
        index = self.index_on(x.device)
        if outer == inner == 1:
            return x.index_select(dim, index)
        before, after = x.shape[:dim], x.shape[dim + 1 :]
        if dim == 0 and outer == 1 and x.is_contiguous():  # a row is one piece of memory: [B * inner, ...] as [B, -1]
            rows = x.view(self.batch, -1).index_select(0, index)
            return rows.view(self.count * inner, *after)
        rows = x.view(*before, outer, self.batch, inner, *after).index_select(dim + 1, index)
        return rows.view(*before, outer * self.count * inner, *after)

    def write(self, how: Callable, out: Tensor, values: Tensor, dim: int, outer: int, inner: int, **options) -> Tensor:
        """Writes a payload to a dense tensor, in place: `how` is `Tensor.index_copy_` or `Tensor.index_add_`."""
        if outer == inner == 1:
            return how(out, dim, self.index_on(out.device), values, **options)
        split = out.unflatten(dim, (outer, self.batch, inner))
        values = values.unflatten(dim, (outer, self.count, inner))
        how(split, dim + 1, self.index_on(out.device), values, **options)
        return out
