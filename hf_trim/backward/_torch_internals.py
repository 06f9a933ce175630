"""
Every private or unstable name of torch that hf_trim uses, in one place. `tests/backward/test_torch_internals.py` says
which of them a version of torch lacks, or has in another shape.

e.g. an in-place op in a rule: `is_mutable(aten.add_.Tensor)` is true, `functional_form` of it is `aten.add.Tensor`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._pytree import tree_iter, tree_map_only


__all__ = ["BatchNorm", "StorageWeakRef", "tree_iter", "tree_map_only"]

# ---- ops ----------------------------------------------------------------------------------------------------------

OpOverload = torch._ops.OpOverload


@cache  # asked for at each dispatch, as `is_mutable` is
def op_name(op: OpOverload) -> str:
    """The name of an op without namespace and overload, e.g. `"sum"`."""
    return op.overloadpacket.__name__


@cache
def is_mutable(op: OpOverload) -> bool:
    """Whether an op changes one of its arguments."""
    return op._schema.is_mutable


def argument_names(op: OpOverload) -> list[str]:
    """The names of an op's arguments, in their order."""
    return [argument.name for argument in op._schema.arguments]


def return_types(op: OpOverload) -> list[str]:
    """The types of what an op returns, e.g. `["Tensor"]`."""
    return [str(returned.type) for returned in op._schema.returns]


@cache
def functional_form(op: OpOverload) -> OpOverload | None:
    """The op that computes what an in-place op writes, e.g. `add.Tensor` for `add_.Tensor`."""
    name = op_name(op)
    if not name.endswith("_"):
        return None
    return getattr(getattr(torch.ops.aten, name[:-1], None), op._overloadname, None)


def is_composite(op: OpOverload) -> bool:
    """
    Whether torch can run an op as the ops that it is made of. Autograd does so before a tensor subclass meets the op,
    unless the device has a kernel for it.
    """
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")


def decompose(op: OpOverload, *args, **kwargs) -> Any:
    """Runs a composite op as the ops that it is made of."""
    return op.decompose(*args, **kwargs)


# ---- tensors and tensor subclasses --------------------------------------------------------------------------------

make_wrapper_subclass = Tensor._make_wrapper_subclass
disabled_torch_function = torch._C._disabled_torch_function_impl
version_of = attrgetter("_version")  # how often the memory of a tensor was written to

# ---- autograd's graph ---------------------------------------------------------------------------------------------

_SAVED = "_raw_saved_"
_saved_names: dict[type, list[str]] = {}


def current_backward_pass() -> int:
    """The number of the backward pass under way; −1 outside of one."""
    return torch._C._current_graph_task_id()


def function_of(node: Node) -> type | None:
    """The `torch.autograd.Function` whose backward a node runs; `None` for a node of ATen's."""
    return getattr(node, "_forward_cls", None)


def replace_function(node: Node, function: type) -> None:
    """Has a node run the backward of another `torch.autograd.Function`."""
    node._forward_cls = function  # type: ignore[attr-defined]


def saved_tensors(node: Node) -> Iterator[tuple[str, Any]]:
    """Attribute and handle (`SavedTensor`, or a tuple of them) of whatever a node of ATen's saved for its formula."""
    kind = type(node)
    if kind not in _saved_names:
        _saved_names[kind] = [name for name in dir(kind) if name.startswith(_SAVED)]
    return ((name, getattr(node, name)) for name in _saved_names[kind])


def saved_value(node: Node, name: str) -> Any:
    """What a node saved under an attribute that [`saved_tensors`] names; `RuntimeError` if it was freed or changed."""
    return getattr(node, name.replace("_raw", "", 1))


def has_no_hooks(saved: Any) -> bool:
    """Whether a saved tensor certainly has no hooks: where torch can't tell, it might have some."""
    return getattr(saved, "unpack_hook", True) is None


@contextmanager
def autograd_below_dispatch() -> Iterator[None]:
    """Within this context autograd records ops as usual, although a `__torch_dispatch__` is under way."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        exclude = exclude.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude):
        yield


# ---- gradient checkpointing ---------------------------------------------------------------------------------------

CheckpointFunction = torch_checkpoint.CheckpointFunction  # use_reentrant=True
CheckpointFrame = torch_checkpoint._CheckpointFrame  # use_reentrant=False
StopRecomputationError = torch_checkpoint._StopRecomputationError


@contextmanager
def wrapped_checkpoint_function(ctx: Any, wrap: Callable) -> Iterator[None]:
    """Within this context, a reentrant checkpoint runs `wrap(function, *inputs)` for `function(*inputs)`."""
    function = ctx.run_function
    ctx.run_function = partial(wrap, function)
    try:
        yield
    finally:
        ctx.run_function = function


def checkpoint_frame(saved: Any) -> CheckpointFrame | None:
    """The checkpoint that is to recompute a saved tensor: its hook knows it."""
    hook = getattr(saved, "unpack_hook", None)
    for cell in getattr(hook, "__closure__", None) or ():
        if isinstance(cell.cell_contents, CheckpointFrame):
            return cell.cell_contents
    return None


def recompute_function(frame: CheckpointFrame) -> Callable:
    """The function that a checkpoint runs again, called with the inputs that it saved."""
    return frame.recompute_fn


def replace_recompute_function(frame: CheckpointFrame, function: Callable) -> None:
    """Has a checkpoint run another function in the place of its own."""
    frame.recompute_fn = function


def recomputed_tensors(frame: CheckpointFrame, backward_pass: int) -> list[Tensor | None]:
    """What a checkpoint recomputed in a backward pass, in the order of saving; `None` where nobody needs it now."""
    holders = [holder() for holder in frame.weak_holders]
    recomputed = frame.recomputed[backward_pass]
    return [None if holder is None else recomputed[holder.handles[backward_pass]] for holder in holders]


def check_recomputed(frame: CheckpointFrame, backward_pass: int) -> None:
    """Raises if what a checkpoint recomputed differs in number, shape, dtype or device from what it saved."""
    if frame.recomp_counter[backward_pass] != len(frame.weak_holders):
        raise RuntimeError("another number of tensors was saved")
    tensors = recomputed_tensors(frame, backward_pass)
    for x, metadata in zip(tensors, frame.x_metadatas, strict=frame.metadata_fn is not None):
        if x is not None and frame.metadata_fn(x) != metadata:
            raise RuntimeError("another tensor was saved")


def forget_recomputed(frame: CheckpointFrame, backward_pass: int) -> None:
    """Has a checkpoint recompute in this backward pass as if it had not done so yet."""
    for reference in frame.weak_holders:
        holder: Any = reference()
        if holder is not None:
            holder.handles.pop(backward_pass, None)
    frame.recomputed.pop(backward_pass, None)
    frame.recomp_counter.pop(backward_pass, None)


def is_recomputation_shared() -> bool:
    """Whether several backward passes share what checkpoints recompute (older versions of torch can't)."""
    group = getattr(torch_checkpoint, "GraphExecGroup", None)
    return group is not None and group._get_current_group() is not None


# ---- modules ------------------------------------------------------------------------------------------------------


def is_compiled_module(module: nn.Module) -> bool:
    """Whether a module itself was compiled, with `torch.compile(module)` or `module.compile()`."""
    return isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None


# ---- benchmarks ---------------------------------------------------------------------------------------------------


def reset_compiler() -> None:
    """Forget all compiled code."""
    torch._dynamo.reset()


def memory_changes(profiler: torch.profiler.profile) -> list[int]:
    """Bytes of each tensor that was made (positive) or freed (negative) while a profile was recorded, in order."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


# ---- torch.compile ------------------------------------------------------------------------------------------------
