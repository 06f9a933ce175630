"""
Every private or unstable name of torch that hf_trim uses, in one place; `tests/backward/test_torch_internals.py` says
which of them a version of torch lacks or has in another shape.
"""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._pytree import tree_iter, tree_map_only


__all__ = ["StorageWeakRef", "tree_iter", "tree_map_only"]

# ---- ops ----------------------------------------------------------------------------------------------------------

OpOverload = torch._ops.OpOverload


def op_name(op: OpOverload) -> str:
    """The name of an op without namespace and overload, e.g. `"sum"`."""
    return op.overloadpacket.__name__


def is_mutable(op: OpOverload) -> bool:
    """Whether an op changes one of its arguments."""
    return op._schema.is_mutable


def argument_names(op: OpOverload) -> list[str]:
    """The names of an op's arguments, in their order."""
    return [argument.name for argument in op._schema.arguments]


def return_types(op: OpOverload) -> list[str]:
    """The types of what an op returns, e.g. `["Tensor"]`."""
    return [str(returned.type) for returned in op._schema.returns]


def functional_form(op: OpOverload) -> OpOverload | None:
    """The op that computes what an in-place op writes, e.g. `add.Tensor` for `add_.Tensor`."""
    name = op_name(op)
    if not name.endswith("_"):
        return None
    return getattr(getattr(torch.ops.aten, name[:-1], None), op._overloadname, None)


def is_composite(op: OpOverload) -> bool:
    """Whether an op is made of other ops above autograd, so that no tensor subclass ever meets it."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")


# ---- tensor subclasses and autograd's graph -----------------------------------------------------------------------

make_wrapper_subclass = Tensor._make_wrapper_subclass
disabled_torch_function = torch._C._disabled_torch_function_impl


def current_backward_pass() -> int:
    """The number of the backward pass under way; −1 outside of one."""
    return torch._C._current_graph_task_id()


# ---- gradient checkpointing (use_reentrant=False) -----------------------------------------------------------------

CheckpointFrame = torch_checkpoint._CheckpointFrame
StopRecomputationError = torch_checkpoint._StopRecomputationError

# ---- benchmarks ---------------------------------------------------------------------------------------------------


def reset_compiler() -> None:
    """Forget all compiled code."""
    torch._dynamo.reset()


def memory_changes(profiler: torch.profiler.profile) -> list[int]:
    """Bytes of each tensor that was made (positive) or freed (negative) while a profile was recorded, in order."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


# ---- torch.compile ------------------------------------------------------------------------------------------------
