"""
Every private or unstable name of torch that hf_trim uses, in one place. `tests/backward/test_torch_internals.py` says
which of them a version of torch lacks, or has in another shape.

e.g. an in-place op in a rule: `is_mutable(aten.add_.Tensor)` is true, `functional_form` of it is `aten.add.Tensor`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import Context
from copy import deepcopy
from functools import cache, partial
from operator import attrgetter, methodcaller
from types import MethodType
from typing import Any, cast

import sympy
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


def is_compiled_module(module: nn.Module) -> bool:
    """Whether a module itself was compiled, with `torch.compile(module)` or `module.compile()`."""
    return isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None


def compiled_modules(model: nn.Module) -> list[nn.Module]:
    """The parts of a model, and the model itself, that were compiled."""
    return [module for module in model.modules() if is_compiled_module(module)]


def without_compilation(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given."""
    return model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model


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


def reset_compiler() -> None:
    """Forget all compiled code."""
    torch._dynamo.reset()


def memory_changes(profiler: torch.profiler.profile) -> list[int]:
    """Bytes of each tensor that was made (positive) or freed (negative) while a profile was recorded, in order."""
    recorded = cast(Any, profiler.profiler).kineto_results  # there is one once the profile is recorded
    events = [event for event in recorded.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


# ---- torch.compile ------------------------------------------------------------------------------------------------


def inductor_options(mode: str) -> dict:
    """Inductor's options for a mode of `torch.compile` with a dynamic batch size, e.g. `"max-autotune"`."""
    from torch._inductor import list_mode_options

    return list_mode_options(mode, True)


def compile_with_inductor(graph: torch.fx.GraphModule, inputs: list, options: dict) -> Callable:
    """Compiles what Dynamo traced, as `torch.compile` does by default."""
    from torch._inductor.compile_fx import compile_fx  # takes a second to import

    # With these arguments it returns a callable; its type allows for other ways to call it.
    return cast(Callable, compile_fx(graph, inputs, config_patches=options or None))


def without_autograd_cache() -> AbstractContextManager:
    """A context in which AOTAutograd's cache of compiled graphs is off; inductor's cache of their code stays on."""
    from torch._functorch import config

    return config.patch(enable_autograd_cache=False)


def with_a_symbol_for_each_size() -> AbstractContextManager:
    """A context in which two sizes that are equal at first (a batch size, a length) do not share a symbol."""
    from torch.fx.experimental import _config

    return cast(Any, _config).patch(use_duck_shape=False)  # torch adds `patch` when it imports the module


def mark_dynamic_if_possible(x: Tensor, dim: int) -> None:
    """Compiles what is traced with `x` for any size of this dimension, unless its code allows for one size only."""
    torch._dynamo.maybe_mark_dynamic(x, dim)


def inductor_configs(module: torch.nn.Module) -> list[dict]:
    """Inductor's options of `torch.compile(module)` and of `module.compile()`; none where there was no such call."""
    calls: tuple[Any, ...] = (module, module._compiled_call_impl)
    configs = [call.get_compiler_config() for call in calls if hasattr(call, "get_compiler_config")]
    return [config for config in configs if config is not None]


# What AOTAutograd makes of `torch.autograd.Function` has no type of its own: `Any` below.


def aot_function(node: torch.autograd.graph.Node) -> Any | None:
    """AOTAutograd's `torch.autograd.Function` whose backward pass a node is; `None` for any other node."""
    function = getattr(node, "_forward_cls", None)
    names = ("_lazy_backward_info", "_backward_impl", "metadata")
    return function if all(hasattr(function, name) for name in names) else None


def aot_backward_graph(function: Any) -> torch.fx.Graph | None:
    """The backward graph of an AOTAutograd function, as it was before inductor; `None` if its cache has none."""
    info = function._lazy_backward_info
    module = getattr(info, "bw_module", None)
    if module is None and hasattr(info, "bw_module_fn"):  # it came from the cache
        module = info.bw_module_fn()
    return getattr(module, "graph", None)


def aot_backward_inputs(function: Any, graph: torch.fx.Graph) -> list:
    """A tensor or size with symbols for each input of a backward graph, with the strides that are really saved."""
    inputs = getattr(function._lazy_backward_info, "placeholder_list", None)
    return inputs or [traced_value(node) for node in graph.find_nodes(op="placeholder")]


def aot_gradient_inputs(graph: torch.fx.Graph) -> list[int]:
    """Positions of the incoming gradients among the inputs of AOTAutograd's backward graph."""
    inputs = graph.find_nodes(op="placeholder")
    return [i for i, node in enumerate(inputs) if node.name.startswith("tangents")]


def aot_outputs_with_gradients(function: Any) -> list[int]:
    """Positions of the outputs (changed inputs first) whose gradients are inputs of the backward graph."""
    metadata = function.metadata
    changed = [metadata.input_info[i] for i in metadata.mutated_inp_runtime_indices]
    positions = [i for i, info in enumerate(changed) if info.mutates_data and info.requires_grad]
    first = len(changed)
    for i, info in enumerate(metadata.output_info):
        differentiable = getattr(info, "requires_grad_for_backward", info.requires_grad)
        own = info.output_type.name in ("non_alias", "unsafe_view_alias", "custom_function_view")
        if own and differentiable and issubclass(info.raw_type, Tensor):
            positions.append(first + i)
    first += metadata.num_outputs
    return positions + list(range(first, first + metadata.num_intermediate_bases))


def aot_backward(function: Any) -> Callable[[Any, list], Any]:
    """What runs the compiled backward graph of an AOTAutograd function: `(ctx, inputs) → gradients`."""
    return function._backward_impl


def aot_backward_is_compiled(function: Any) -> bool:
    """Whether the backward graph of an AOTAutograd function was compiled: without symbols it is at its first run."""
    return function.compiled_bw is not None


def replace_aot_backward(function: Any, run: Callable[[Any, list], Any]) -> None:
    """Has a callable stand in for what [`aot_backward`] gives."""
    function._backward_impl = staticmethod(run)


def free_saved_tensors(ctx: Any) -> None:
    """Drops an AOTAutograd node's own references to what was saved for its backward pass, unless it may run again."""
    ctx.maybe_clear_saved_tensors()


def traced_value(node: torch.fx.Node) -> Any:
    """What a node of a traced graph stands for: a tensor or size with symbols; `None` if that is not known."""
    return node.meta.get("val")


def is_traced(node: torch.fx.Node) -> bool:
    """Whether it is known what a node of a graph stands for."""
    return "val" in node.meta


def size_expression(size: int | torch.SymInt | torch.SymFloat | torch.SymBool) -> sympy.Expr:
    """A size of a traced graph as a formula of symbols, e.g. `7*s0`."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def size_assumptions(size: torch.SymInt, symbol: sympy.Symbol) -> tuple[list[sympy.Expr], int]:
    """What a traced graph takes for granted of a symbol: conditions that must hold, and its least value."""
    env = size.node.shape_env
    conditions = [env.replace(guard.expr) for guard in env.guards]
    least = int(env.var_to_range[symbol].lower) if symbol in env.var_to_range else 2
    return [condition for condition in conditions if symbol in condition.free_symbols], least
