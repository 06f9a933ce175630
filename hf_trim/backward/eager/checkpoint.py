"""
Gradient checkpointing recomputes the kept rows only.

The function that a checkpoint runs again is arbitrary code, so nothing is assumed of it: its inputs become
[`~hf_trim.backward.eager.tensor.ActivationRows`], and each op on them has to prove, by its rule, that the kept rows
of its result follow from the kept rows of its operands. Where one can't (samples are mixed, dropout inside a fused
kernel, an op without a rule), everything is recomputed, as without trimming. Dropout masks are those of the forward
pass.
"""

import weakref
from functools import partial

import torch
from torch import Tensor
from torch.utils import checkpoint as torch_checkpoint

from hf_trim.backward.eager.saved import saved_names
from hf_trim.backward.eager.tensor import ActivationRows, Rows


def find_frame(node):
    """
    The checkpoint (`use_reentrant=False`) in which a node of the graph was made.

    Args:
        node (`torch.autograd.graph.Node`): The node.

    Returns:
        The checkpoint's frame, or `None`.
    """
    for name in saved_names(node):
        saved = getattr(node, name)
        for each in saved if isinstance(saved, tuple) else (saved,):
            hook = getattr(each, "unpack_hook", None)
            for cell in getattr(hook, "__closure__", None) or ():
                if isinstance(cell.cell_contents, torch_checkpoint._CheckpointFrame):
                    return cell.cell_contents
    return None


def recompute_kept_rows(node, rows: Rows) -> None:
    """
    Lets the checkpoint that a node belongs to recompute the kept rows only, in the backward pass of these rows.

    Args:
        node (`torch.autograd.graph.Node`): A node of the graph.
        rows ([`~hf_trim.backward.eager.tensor.Rows`]): The kept rows.
    """
    frame = find_frame(node)
    if frame is not None:
        before = frame.recompute_fn
        if isinstance(before, _KeptRows):
            if before.rows is rows:
                return
            before = before.recompute  # of an earlier selection from the same graph
        frame.recompute_fn = _KeptRows(frame, before, rows)


def _in_exec_group() -> bool:
    """Whether several backward passes share what is recomputed."""
    group = getattr(torch_checkpoint, "GraphExecGroup", None)
    return group is not None and group._get_current_group() is not None


class _KeptRows:
    """Stands in for the function that a checkpoint runs again."""

    def __init__(self, frame, recompute, rows: Rows):
        self.frame, self.recompute, self.rows = weakref.ref(frame), recompute, rows
        self.saved: list[Tensor] | None = None

    def __call__(self, *args):
        frame, task = self.frame(), torch._C._current_graph_task_id()
        kept = [self._kept(x) for x in args]
        able = task == self.rows.task and not self.rows.mixing and not _in_exec_group()
        if not able or not any(isinstance(x, ActivationRows) for x in kept):
            return self.recompute(*args)
        stopped = False
        try:
            try:
                self.recompute(*kept)
            except torch_checkpoint._StopRecomputationError:
                stopped = True  # all that was saved is there
            self._check(frame, task)
        except Exception:  # of whatever kind: a function may insist on ordinary tensors
            self.rows.mixing = True  # layers are alike: the others need not try
            self._forget(frame, task)
            return self.recompute(*args)
        for position, holder in enumerate(frame.weak_holders):
            holder = holder()
            x = None if holder is None else frame.recomputed[task][holder.handles[task]]
            if isinstance(x, ActivationRows):
                x.whole = partial(self._whole, position, args)
        if stopped:
            raise torch_checkpoint._StopRecomputationError  # a new one: the other's traceback holds the activations

    def _kept(self, x):
        if not isinstance(x, Tensor) or isinstance(x, ActivationRows) or x.ndim == 0 or x.shape[0] != self.rows.batch:
            return x
        return ActivationRows(self.rows.take(x.detach()), self.rows).requires_grad_(x.requires_grad)

    @staticmethod
    def _check(frame, task):
        if frame.recomp_counter[task] != len(frame.weak_holders):
            raise RuntimeError("another number of tensors was saved")
        for holder, before in zip(frame.weak_holders, frame.x_metadatas, strict=frame.metadata_fn is not None):
            holder = holder()
            if holder is not None and frame.metadata_fn(frame.recomputed[task][holder.handles[task]]) != before:
                raise RuntimeError("another tensor was saved")

    @staticmethod
    def _forget(frame, task):
        for holder in frame.weak_holders:
            holder = holder()
            if holder is not None:
                holder.handles.pop(task, None)
        frame.recomputed.pop(task, None)
        frame.recomp_counter.pop(task, None)

    def _whole(self, position, args):
        """The saved tensor number `position`, all rows of it: an op without a rule asks for it."""
        if self.saved is None:
            self.rows.mixing = True
            self.saved = []

            def pack(x):
                self.saved.append(x.detach())
                return x

            # An op of the backward pass asks, where autograd does not listen.
            exclude = torch._C._dispatch_tls_local_exclude_set()
            for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
                exclude = exclude.remove(key)
            with (
                torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude),
                torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
                torch.enable_grad(),
            ):
                self.recompute(*args)
        return self.saved[position]
