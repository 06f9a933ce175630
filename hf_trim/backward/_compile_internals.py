"""
The private or unstable names of torch that are about `torch.compile`, as `_torch_internals.py` has the others.
`tests/backward/test_torch_internals_compile.py` says which of them a version of torch lacks, or has in another shape.

e.g. the backward pass of `torch.compile(layer)(x)`: [`aot_function`] of its node is a `torch.autograd.Function`, and
[`aot_backward_graph`] of that the graph, whose sizes [`size_expression`] gives as formulas, such as `7*s0`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import sympy
import torch
from torch import Tensor, nn


# ---- compiling ----------------------------------------------------------------------------------------------------


def is_compiled_module(module: nn.Module) -> bool:
    """Whether a module itself was compiled, with `torch.compile(module)` or `module.compile()`."""
    return isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None


def compiled_modules(model: nn.Module) -> list[nn.Module]:
    """The parts of a model, and the model itself, that were compiled."""
    return [module for module in model.modules() if is_compiled_module(module)]


def without_compilation(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given."""
    return model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model


def reset_compiler() -> None:
    """Forget all compiled code."""
    torch._dynamo.reset()


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


# ---- AOTAutograd's graphs -----------------------------------------------------------------------------------------

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


def is_range(node: torch.fx.Node) -> bool:
    """Whether a node of a traced graph is what `torch.arange(n)` returned: 0, 1, 2, ..."""
    return str(node.meta.get("original_aten")) == "aten.arange.default"  # a copy of the op


def size_expression(size: int | torch.SymInt | torch.SymFloat | torch.SymBool) -> sympy.Expr:
    """A size of a traced graph as a formula of symbols, e.g. `7*s0`."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def size_assumptions(size: torch.SymInt, symbol: sympy.Symbol) -> tuple[list[sympy.Expr], int]:
    """What a traced graph takes for granted of a symbol: conditions that must hold, and its least value."""
    env = size.node.shape_env
    conditions = [env.replace(guard.expr) for guard in env.guards]
    least = int(env.var_to_range[symbol].lower) if symbol in env.var_to_range else 2
    return [condition for condition in conditions if symbol in condition.free_symbols], least
