"""
Every private or unstable name of torch that hf_trim uses, in one place; those that are about `torch.compile` are in
`_compile_internals.py`. `tests/backward/test_torch_internals.py` says which of them a version of torch lacks, or has
in another shape.

e.g. an in-place op in a rule: `is_mutable(aten.add_.Tensor)` is true, `functional_form` of it is `aten.add.Tensor`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context
from copy import deepcopy
from functools import cache, partial
from operator import attrgetter, methodcaller
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules._functions import BackwardHookFunction
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode as current_dispatch_mode
from torch.utils._pytree import tree_iter, tree_map, tree_map_only


__all__ = [
    "BackwardHookFunction", "BatchNorm", "StorageWeakRef", "TorchDispatchMode", "current_dispatch_mode", "tree_iter",
    "tree_map", "tree_map_only",
]  # fmt: skip

# ---- ops ----------------------------------------------------------------------------------------------------------

OpOverload = torch._ops.OpOverload


@cache  # asked for at each dispatch, as `is_mutable` is
def op_name(op: OpOverload) -> str:
    """The name of an op without namespace and overload, e.g. `"sum"`."""
    return op.overloadpacket.__name__


def is_torch_op(op: OpOverload) -> bool:
    """Whether an op is torch's own. In another library, one of the same name may do something else."""
    return op.namespace in ("aten", "prims")


@cache
def is_mutable(op: OpOverload) -> bool:
    """Whether an op changes one of its arguments."""
    return op._schema.is_mutable


@cache
def op_arguments(op: OpOverload) -> list[tuple[str, bool]]:
    """The name of each argument of an op, and whether the op changes it."""
    return [(x.name, x.alias_info is not None and x.alias_info.is_write) for x in op._schema.arguments]


def return_types(op: OpOverload) -> list[str]:
    """The types of what an op returns, e.g. `["Tensor"]`."""
    return [str(returned.type) for returned in op._schema.returns]


def written_arguments(op: OpOverload, args: tuple, kwargs: dict) -> list:
    """The arguments of a call that an op changes: tensors, and lists of them."""
    names = enumerate(op_arguments(op))
    return [args[i] if i < len(args) else kwargs.get(name) for i, (name, is_written) in names if is_written]


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
negative_view = torch._neg_view  # the lazy negative of a tensor; the tensor without the bit, if it is one
disabled_torch_function = torch._C._disabled_torch_function_impl
base_of = attrgetter("_base")  # what a tensor is a view of; `None` where it is none, or autograd does not know


def same_view(view: Tensor, base: Tensor) -> Tensor:
    """The view of `base` that `view` is of its own base."""
    return view._view_func_unsafe(base)  # type: ignore[attr-defined]


def tensors_sharing_memory(x: Tensor) -> int:
    """The number of ordinary tensors, this one among them, that share the memory of `x`."""
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata) - 1  # without the object that was made to ask


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors, views or not, have the same memory."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


version_of = attrgetter("_version")  # how often the memory of a tensor was written to

# ---- autograd's graph ---------------------------------------------------------------------------------------------

_SAVED = "_raw_saved_"
_saved_names: dict[type, list[str]] = {}


def current_backward_pass() -> int:
    """The number of the backward pass under way; −1 outside of one."""
    return torch._C._current_graph_task_id()


current_node = torch._C._current_autograd_node  # the one whose backward runs in this thread; `None` outside of one
strided_size = attrgetter("_saved_size")  # of a node of `as_strided`: the size of its result
sequence_number = methodcaller("_sequence_nr")  # of a node: its place in the order of the forward pass


def context_of_backward() -> Context | None:
    """The context of the thread that called `backward`, in any that autograd runs it in; older versions lack it."""
    return torch._C._get_obj_in_tls("context") if torch._C._is_key_in_tls("context") else None


def function_of(node: Node) -> type | None:
    """The `torch.autograd.Function` whose backward a node runs; `None` for a node of ATen's."""
    return getattr(node, "_forward_cls", None)


def replace_function(node: Node, function: type) -> None:
    """Has a node run the backward of another `torch.autograd.Function`."""
    node._forward_cls = function  # type: ignore[attr-defined]


def saved_tensors(node: Node) -> Iterator[tuple[str, Any]]:
    """Attribute and handle (`SavedTensor`, or a tuple of them) of whatever a node saved for its formula."""
    kind = type(node)
    if kind not in _saved_names:
        _saved_names[kind] = [name for name in dir(kind) if name.startswith(_SAVED)]
    return ((name, getattr(node, name)) for name in _saved_names[kind])


def saved_value(node: Node, name: str) -> Any:
    """What a node saved under an attribute that [`saved_tensors`] names; `RuntimeError` if it was freed or changed."""
    return getattr(node, name.replace("_raw", "", 1) if function_of(node) is None else "saved_tensors")


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


@contextmanager
def around_call(module: nn.Module, wrapper: Callable[..., Any]) -> Iterator[None]:
    """
    In this context, `module(...)` runs `wrapper(forward, ...)`, outside of what is compiled. A forward hook would be
    compiled with a module on which `compile()` was called.
    """
    with around(module, "forward" if module._compiled_call_impl is None else "_compiled_call_impl", wrapper):
        yield


class _Around:
    """The method of an object with a wrapper around it. A copy of the object has the method without."""

    def __init__(self, owner: Any, method: Callable[..., Any], wrapper: Callable[..., Any]):
        self.owner, self.method, self.wrapper = owner, method, wrapper

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapper(self.method, *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Any:
        copied = memo.get(id(self.owner))
        method: Any = self.method
        is_bound = isinstance(method, MethodType) and method.__self__ is self.owner
        return MethodType(method.__func__, copied) if is_bound and copied is not None else deepcopy(method, memo)


@contextmanager
def around(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """In this context, `owner.name(...)` runs `wrapper(original, ...)`."""
    original, is_own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, _Around(owner, original, wrapper))
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def is_transforming() -> bool:
    """Whether a transform of `torch.func` is under way, such as `vmap` or `grad`."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_batched(x: Tensor) -> bool:
    """Whether a tensor stands for many, as gradients do with `torch.autograd.grad(..., is_grads_batched=True)`."""
    return torch._C._functorch.is_legacy_batchedtensor(x) or torch._C._functorch.is_batchedtensor(x)


def assert_later(condition: Tensor, message: str) -> None:
    """Has the device raise an error, without waiting for it, if a boolean tensor is false."""
    torch._assert_async(condition, message)


# ---- benchmarks ---------------------------------------------------------------------------------------------------


def memory_changes(profiler: torch.profiler.profile) -> list[int]:
    """Bytes of each tensor that was made (positive) or freed (negative) while a profile was recorded, in order."""
    recorded = cast(Any, profiler.profiler).kineto_results  # there is one once the profile is recorded
    events = [event for event in recorded.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
