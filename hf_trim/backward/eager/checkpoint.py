"""
Gradient checkpointing recomputes the kept rows only.

The function that a checkpoint runs again is arbitrary code, so nothing is assumed of it. Its inputs become
[`~hf_trim.backward.eager.activation.ActivationRows`], and the rule of each op on them has to make sure that the kept
rows of the result follow from the kept rows of the operands. Where one can't (samples are mixed, an op without a
rule), everything is recomputed, as without trimming. Dropout masks are those of the forward pass.

e.g. a checkpointed layer of inputs `[B, T, C]`, B = 4, rows 1 and 3 kept: it runs again on `ActivationRows` with the
payload `[2, T, C]`, and whatever its nodes saved comes back as `ActivationRows` too.
"""

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from hf_trim.backward._torch_internals import (
    CheckpointFrame,
    StopRecomputationError,
    autograd_below_dispatch,
    check_recomputed,
    checkpoint_frame,
    current_backward_pass,
    forget_recomputed,
    is_recomputation_shared,
    recompute_function,
    recomputed_tensors,
    replace_recompute_function,
    saved_tensors,
)
from hf_trim.backward.eager.activation import ActivationRows
from hf_trim.backward.eager.rows import Rows, extent


def find_frame(node: Node) -> CheckpointFrame | None:
    """
    The checkpoint (`use_reentrant=False`) in which a node of the graph was made.

    Args:
        node (`torch.autograd.graph.Node`): The node.

    Returns:
        The checkpoint's frame, or `None`.
    """
    for _, saved in saved_tensors(node):
        for handle in saved if isinstance(saved, tuple) else (saved,):
            frame = checkpoint_frame(handle)
            if frame is not None:
                return frame
    return None


def recompute_kept_rows(node: Node, rows: Rows) -> None:
    """
    Lets the checkpoint that a node belongs to recompute the kept rows only, in the backward pass of these rows.

    Args:
        node (`torch.autograd.graph.Node`): A node of the graph.
        rows ([`~hf_trim.backward.eager.rows.Rows`]): The kept rows.
    """
    frame = find_frame(node)
    if frame is not None:
        recompute = recompute_function(frame)
        if isinstance(recompute, _KeptRows):
            if recompute.rows is rows:
                return
            recompute = recompute.recompute  # this one is of an earlier selection from the same graph
        replace_recompute_function(frame, _KeptRows(frame, recompute, rows))


class _KeptRows:
    """Stands in for the function that a checkpoint runs again. The checkpoint's frame holds this object."""

    def __init__(self, frame: CheckpointFrame, recompute, rows: Rows):
        self.frame, self.recompute, self.rows = weakref.ref(frame), recompute, rows
        self.saved: list[Tensor] | None = None

    def __call__(self, *args):
        frame, backward_pass = self.frame(), current_backward_pass()
        kept = [self._kept(x) for x in args]
        # Another backward pass through the same graph, of other rows or of all, needs more than these rows.
        is_own_pass = backward_pass == self.rows.backward_pass and not is_recomputation_shared()
        has_rows = any(isinstance(x, ActivationRows) for x in kept)
        if not is_own_pass or not has_rows or self.rows.needs_all_rows:
            return self.recompute(*args)
        stopped = False
        try:
            try:
                self.recompute(*kept)
            except StopRecomputationError:
                stopped = True  # all that was saved is there
            check_recomputed(frame, backward_pass)
        except Exception:  # of whatever kind: a function may insist on ordinary tensors
            self.rows.needs_all_rows = True  # the other layers would fail in the same way
            forget_recomputed(frame, backward_pass)
            return self.recompute(*args)
        for position, x in enumerate(recomputed_tensors(frame, backward_pass)):
            if isinstance(x, ActivationRows):
                x.materialize = partial(self._materialize, position, args)
        if stopped:
            raise StopRecomputationError  # a new one: the other's traceback holds the activations

    def _kept(self, x: Any) -> Any:
        """The kept rows of an input of the function, if its first dimension is the batch; else the input itself."""
        if not isinstance(x, Tensor) or isinstance(x, ActivationRows) or x.ndim == 0 or x.shape[0] != self.rows.batch:
            return x
        if x.device.type != "cpu" and extent(x.shape, x.stride()) != x.numel():
            return x  # other memory: random numbers are drawn in its order
        return ActivationRows(self.rows.take(x.detach()), self.rows).requires_grad_(x.requires_grad)

    def _materialize(self, position: int, args: tuple) -> Tensor:
        """All rows of the saved tensor number `position`: an op without a rule asks for them."""
        if self.saved is None:
            self.rows.needs_all_rows = True
            self.saved = []

            def pack(x):
                self.saved.append(x.detach())
                return x

            # An op of the backward pass asks, where autograd would record nothing.
            with (
                autograd_below_dispatch(),
                torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
                torch.enable_grad(),
            ):
                self.recompute(*args)
        return self.saved[position]
