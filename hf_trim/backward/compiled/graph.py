"""
The backward pass of a compiled graph on the kept rows.

`torch.compile` makes one backward graph for every batch size if the batch dimension is dynamic. Where a row-sparse
gradient reaches it, what the forward pass saved is sliced to the kept rows, and the graph is called with their number
in place of the batch size: the same code, nothing compiled anew, whatever p is. `proof.py` says which dimensions to
slice, and whether the gradients are those of the whole batch; if not, the graph runs on the whole batch.
"""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sympy
import torch
from torch import SymInt, Tensor

from hf_trim.backward.compiled import proof_rules  # noqa: F401
from hf_trim.backward.compiled.proof import ELSEWHERE, EVERYWHERE, NOWHERE, Proof, Value, expression, prove
from hf_trim.backward.eager.tensor import Rows, RowSparseTensor, RowTensor, densify
from hf_trim.backward.settings import FALLBACKS, REFUSED_GRAPHS, Settings


logger = logging.getLogger(__name__)
_PENDING = "hf_trim_pending"
_READY = "hf_trim_ready"
_ALIGNMENT = 16  # bytes that inductor's kernels rely on
# Relative difference to the dense gradient, over all outputs of a graph, that rounding may explain. Rows that are
# mixed up make one of about 1.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_PADDING = 16  # rows at most by which a number of kept rows is rounded up to one that the graph was compiled for
CUDA_GRAPHS = (
    "a CUDA graph replays one batch size, and the number of kept rows changes with p (mode='default' and "
    "'max-autotune-no-cudagraphs' have none)"
)


class GraphRefusedError(Exception):
    """Why a compiled graph runs on the whole batch."""


class Call(NamedTuple):
    """
    One backward pass through a compiled graph.

    Args:
        rows ([`~hf_trim.backward.eager.tensor.Rows`]): The kept rows.
        grads (`tuple`): What arrives for each output that the graph has a gradient for: a tensor or `None`.
    """

    rows: Rows
    grads: tuple


@dataclass
class Plan:
    """
    What is sliced for a combination of gradients that arrive.

    Args:
        proof ([`~hf_trim.backward.compiled.proof.Proof`]): Where the rows are.
        reason (`str`): Why the graph can't run on them; empty if it can.
        checked (`bool`): Whether its gradients were compared with the dense ones.
        sizes (`dict`): By the sizes of a call: number of rows, inputs and outputs, in numbers.
    """

    proof: Proof | None = None
    reason: str = ""
    checked: bool = False
    sizes: dict = field(default_factory=dict)


def is_compiled_graph(node: torch.autograd.graph.Node) -> bool:
    """
    Args:
        node (`torch.autograd.graph.Node`): A node of an autograd graph.

    Returns:
        `bool`: Whether it is the backward pass of a graph that AOTAutograd compiled.
    """
    function = getattr(node, "_forward_cls", None)
    return all(hasattr(function, name) for name in ("_lazy_backward_info", "_backward_impl", "metadata"))


def accept_row_sparse_gradients(node: torch.autograd.graph.Node) -> None:
    """
    Prepares the backward pass of a compiled graph for row-sparse gradients.

    Args:
        node (`torch.autograd.graph.Node`): The node, for which `is_compiled_graph` is true.
    """
    if _READY in node.metadata:  # the node lives longer than one backward pass
        return
    node.metadata[_READY] = True
    function = node._forward_cls
    if "_hf_trim" not in vars(function):
        function._hf_trim = CompiledBackward(function)
    graph = function._hf_trim

    def prehook(grads):
        node.metadata.pop(_PENDING, None)
        first = next((grad for grad in grads if isinstance(grad, RowTensor)), None)
        if first is None:
            return None
        node.metadata[_PENDING] = Call(first.rows, tuple(grads[at] for at in graph.tangents if at < len(grads)))
        return tuple(densify(grad) for grad in grads)

    node.register_prehook(prehook)


def compile_for_rows(graph: torch.fx.GraphModule, inputs: list, mode: str | None = None, options: dict | None = None):
    """
    A backend for `torch.compile`: inductor, with a backward pass that can run on the kept rows.

    ```python
    losses_of = torch.compile(losses_of, backend="hf_trim", dynamic=True)
    trimmed_mean(losses_of(batch), keep=0.2, backward="sparse").backward()
    ```

    Args:
        graph (`torch.fx.GraphModule`): What Dynamo traced.
        inputs (`list`): Its inputs.
        mode (`str`, *optional*): As for `torch.compile`, but for those with CUDA graphs.
        options (`dict`, *optional*): As for `torch.compile`.

    Returns:
        `Callable`: The compiled graph.

    Raises:
        `ValueError`: If CUDA graphs are asked for.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode, True) if mode else {}), **(options or {})}
    if patches.get("triton.cudagraphs"):
        raise ValueError(f"backend='hf_trim' compiles without CUDA graphs: {CUDA_GRAPHS}.")
    with keep_backward_graphs():
        return compile_fx(graph, inputs, config_patches=patches or None)


@contextmanager
def keep_backward_graphs():
    """
    What is compiled in this context keeps its backward graph, of which AOTAutograd's cache would leave nothing to look
    at (inductor's own cache of the compiled code goes on), and tells a batch size from a length that is the same.
    """
    with (
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch.fx.experimental._config.patch(use_duck_shape=False),
    ):
        yield


def uses_cuda_graphs(model: torch.nn.Module) -> bool:
    """
    Args:
        model (`torch.nn.Module`): A model.

    Returns:
        `bool`: Whether it, or a part of it, was compiled in a mode that records CUDA graphs.
    """
    compiled = [each for module in model.modules() for each in (module, module._compiled_call_impl)]
    configs = [each.get_compiler_config() for each in compiled if hasattr(each, "get_compiler_config")]
    return any(config is not None and config.get("triton.cudagraphs") for config in configs)


def mark_batch_dynamic(inputs: Mapping, size: int) -> None:
    """
    Has graphs that are compiled for these inputs serve other batch sizes as well, if their code allows for it.

    Args:
        inputs (`Mapping`): The model's inputs; tensors whose first dimension is the batch, and whatever else.
        size (`int`): Size B of that dimension.
    """
    for value in inputs.values():
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == size > 1:
            torch._dynamo.maybe_mark_dynamic(value, 0)


class CompiledBackward:
    """
    The backward pass of one compiled graph.

    Args:
        function (`type`): AOTAutograd's `torch.autograd.Function`, whose `_backward_impl` this one then stands in for.
    """

    def __init__(self, function: type):
        self.plans: dict[tuple, Plan] = {}
        self.dense: Callable = function._backward_impl
        self.tangents = _outputs_with_gradients(function.metadata)
        info = function._lazy_backward_info
        module = getattr(info, "bw_module", None)
        if module is None and hasattr(info, "bw_module_fn"):  # it came from the cache
            module = info.bw_module_fn()
        self.graph = getattr(module, "graph", None)
        self.inputs, self.examples, self.places = [], [], {}
        if self.graph is not None:  # `placeholder_list` has the strides that the forward pass really saves
            self.inputs = self.graph.find_nodes(op="placeholder")
            given = getattr(info, "placeholder_list", None)
            self.examples = given or [node.meta.get("val") for node in self.inputs]
            self.places = _places_of_symbols(self.examples)
        self.grads = [at for at, node in enumerate(self.inputs) if node.name.startswith("tangents")]
        function._backward_impl = staticmethod(self._run)

    def _run(self, ctx, args: list) -> Any:
        call = ctx.metadata.pop(_PENDING, None)
        if call is None:
            return self.dense(ctx, args)
        try:
            plan, values = self._plan(call, args)
            return self._on_rows(ctx, args, call, plan, values)
        except GraphRefusedError as refused:
            self._refuse(str(refused))
        return self.dense(ctx, args)

    def _refuse(self, reason: str) -> None:
        if Settings.strict:
            raise RuntimeError(f"A compiled backward graph cannot run on the kept rows: {reason}.")
        if reason not in REFUSED_GRAPHS:
            logger.warning("A compiled backward graph runs on the whole batch: %s.", reason)
        REFUSED_GRAPHS[reason] += 1
        FALLBACKS[f"a compiled graph ({reason})"] += 1

    # ---- what is sliced -------------------------------------------------------------------------------------------

    def _plan(self, call: Call, args: list) -> tuple[Plan, dict]:
        """The plan for these gradients, and the values of the graph's symbols."""
        if self.graph is None or any("val" not in node.meta for node in self.inputs):
            raise GraphRefusedError(
                "AOTAutograd's cache has kept no graph of it (backend='hf_trim' does without that cache)"
            )
        if len(args) != len(self.inputs):
            raise GraphRefusedError("it has inputs that are not in its graph")
        values = {
            symbol: int(args[at] if dim is None else args[at].shape[dim]) for symbol, (at, dim) in self.places.items()
        }
        kinds = tuple(_kind(grad, call.rows) for grad in call.grads)
        if kinds not in self.plans:
            self.plans[kinds] = self._make_plan(call, values)
        plan = self.plans[kinds]
        if plan.reason:
            raise GraphRefusedError(plan.reason)
        if values[plan.proof.batch] != call.rows.batch:
            raise GraphRefusedError("two of its sizes were equal when its rows were looked for, and are no longer")
        return plan, values

    def _make_plan(self, call: Call, values: dict) -> Plan:
        if len(self.grads) != len(call.grads):
            return Plan(reason="its gradients cannot be told apart")
        zeros, batches = {}, []
        for at, grad in zip(self.grads, call.grads, strict=True):
            node = self.inputs[at]
            zeros[node] = EVERYWHERE if grad is None else NOWHERE
            if _is_sparse(grad):
                if grad.rows is not call.rows:
                    return Plan(reason="gradients of different rows meet")
                zeros[node] = ELSEWHERE
                batches.append(self._batch_symbols(node, grad, values))
        candidates = [symbol for symbol in batches[0] if all(symbol in others for others in batches)]
        if not candidates:
            return Plan(reason="it was compiled for one batch size alone (dynamic=True makes it serve all)")
        proofs = [prove(self.graph, symbol, zeros) for symbol in candidates]
        proof = next((proof for proof in proofs if not proof.reason), proofs[0])
        return Plan(proof, proof.reason)

    def _batch_symbols(self, node, grad: RowSparseTensor, values: dict) -> list[sympy.Symbol]:
        """Which symbols may be the batch size, as far as the shape of a gradient tells."""
        size = expression(node.meta["val"].shape[grad.row_dim])
        others = grad.row_outer * grad.row_inner
        return [
            symbol
            for symbol in size.free_symbols
            if values.get(symbol) == grad.rows.batch and _number(size / symbol, values) == others
        ]

    def _sizes(self, plan: Plan, call: Call, values: dict) -> tuple[int, list, list]:
        """Number of rows to run on, and the shapes and places of inputs and outputs in numbers."""
        batch = plan.proof.batch
        key = (call.rows.count, *values.values())
        if key not in plan.sizes:
            count = self._admitted(call.rows, batch, values)
            at = {**values, batch: count}
            inputs = [
                self._input_in_numbers(example, value, at)
                for example, value in zip(self.examples, plan.proof.inputs, strict=True)
            ]
            outputs = [None if value is None else _layout(value, at, batch) for value in plan.proof.outputs]
            plan.sizes[key] = count, inputs, outputs
        return plan.sizes[key]

    def _input_in_numbers(self, example: Any, value: Value | None, at: dict) -> Any:
        if isinstance(example, SymInt):
            return _number(expression(example), at)
        if value is None or value.dim is None:
            return None
        layout = value.dim, _number(value.outer, at), _number(value.inner, at)
        strides = [_number(expression(stride), at) for stride in example.stride()]
        return layout, [_number(size, at) for size in value.shape], strides

    def _admitted(self, rows: Rows, batch: sympy.Symbol, values: dict) -> int:
        """The smallest number of rows, at least the kept, for which the graph's assumptions on its sizes hold."""
        env = next(example.node.shape_env for example in _symbolic_sizes(self.examples))
        guards = [env.replace(guard.expr) for guard in env.guards]
        guards = [guard for guard in guards if batch in guard.free_symbols]
        lower = env.var_to_range[batch].lower if batch in env.var_to_range else 2
        for count in range(max(2, int(lower), rows.count), min(rows.count + _PADDING, rows.batch) + 1):
            at = {symbol: sympy.Integer(value) for symbol, value in {**values, batch: count}.items()}
            if all(guard.xreplace(at) == sympy.true for guard in guards):
                return count
        raise GraphRefusedError(f"it was compiled for batch sizes that {rows.count} is not one of")

    # ---- running it -----------------------------------------------------------------------------------------------

    def _on_rows(self, ctx, args: list, call: Call, plan: Plan, values: dict) -> list:
        count, inputs, outputs = self._sizes(plan, call, values)
        arrived = {at: grad for at, grad in zip(self.grads, call.grads, strict=True) if _is_sparse(grad)}
        for at, grad in arrived.items():
            if inputs[at][0] != (grad.row_dim, grad.row_outer, grad.row_inner):
                raise GraphRefusedError("a gradient has its rows in another place than the graph")
        if not all(_counts_rows(args[at]) for at in plan.proof.row_numbers):
            raise GraphRefusedError("it looks up rows by other numbers than their own")
        rows = _padded(call.rows, count)
        check = Settings.check_compiled and not plan.checked
        whole = list(args) if check else None
        ctx.maybe_clear_saved_tensors()  # each tensor is freed when its rows are taken
        for at, (given, place) in enumerate(zip(args, inputs, strict=True)):
            if at in plan.proof.row_numbers:
                args[at] = torch.arange(count, dtype=given.dtype, device=given.device)
            elif isinstance(place, int):
                args[at] = place
            elif place is not None:
                args[at] = None
                args[at] = _take(given, rows, *place, copy=check)
            del given
        for at in arrived if count > call.rows.count else ():
            dim, outer, inner = inputs[at][0]
            padding = args[at].unflatten(dim, (outer, count, inner))
            padding.narrow(dim + 1, call.rows.count, count - call.rows.count).zero_()
        found = self._wrapped(self.dense(ctx, args), outputs, call.rows, count)
        return self._check(found, self.dense(ctx, whole), plan) if check else found

    def _wrapped(self, found: list, outputs: list, rows: Rows, count: int) -> list:
        """Gradients that carry rows, as row-sparse ones."""
        return [
            grad if place is None or grad is None else _row_sparse(grad, rows, count, *place)
            for grad, place in zip(found, outputs, strict=True)
        ]

    def _check(self, found: list, dense: list, plan: Plan) -> list:
        """
        Compares the first gradients with the dense ones, and hands back those to go on with. What is proved is so, if
        the proof's rules are right, and the compiler made no use of a size that its guards do not tell of.
        """
        pairs = [
            (densify(a), b)
            for a, b in zip(found, dense, strict=True)
            if isinstance(b, Tensor) and b.is_floating_point() and b.numel()
        ]
        error = sum(float(torch.linalg.vector_norm((a - b).float())) ** 2 for a, b in pairs) ** 0.5
        norm = sum(float(torch.linalg.vector_norm(b.float())) ** 2 for _, b in pairs) ** 0.5
        if norm == 0 or not math.isfinite(norm):
            return found  # nothing to compare with; the next backward pass may have it
        plan.checked = True
        dtypes = {each.dtype for each in (*self.examples, *dense) if isinstance(each, Tensor)}
        if error <= norm * max(_TOLERANCE.get(dtype, 0) for dtype in dtypes):  # of the least precise in the graph
            return found
        plan.reason = "on the kept rows it gave other gradients than on the whole batch"
        logger.error(
            "A compiled backward graph, run on the kept rows, gave other gradients than on the whole batch (relative "
            "difference %.1e). It runs on the whole batch from now on; please report this model.", error / norm,
        )  # fmt: skip
        self._refuse(plan.reason)
        return dense


# ---- sizes ---------------------------------------------------------------------------------------------------------


def _outputs_with_gradients(metadata) -> list[int]:
    """Positions of the outputs (changed inputs first) whose gradient is among the inputs of AOTAutograd's graph."""
    changed = [metadata.input_info[at] for at in metadata.mutated_inp_runtime_indices]
    positions = [at for at, info in enumerate(changed) if info.mutates_data and info.requires_grad]
    first = len(changed)
    for at, info in enumerate(metadata.output_info):
        differentiable = getattr(info, "requires_grad_for_backward", info.requires_grad)
        own = info.output_type.name in ("non_alias", "unsafe_view_alias", "custom_function_view")
        if own and differentiable and issubclass(info.raw_type, Tensor):
            positions.append(first + at)
    first += metadata.num_outputs
    return positions + list(range(first, first + metadata.num_intermediate_bases))


def _is_sparse(grad: Any) -> bool:
    return isinstance(grad, RowSparseTensor)


def _kind(grad: Any, rows: Rows) -> str:
    if _is_sparse(grad):
        return "rows" if grad.rows is rows else "other rows"
    return "none" if grad is None else "dense"


def _symbolic_sizes(examples: list):
    for example in examples:
        sizes = (*example.shape,) if isinstance(example, Tensor) else (example,)
        yield from (size for size in sizes if isinstance(size, SymInt))


def _places_of_symbols(examples: list) -> dict[sympy.Symbol, tuple[int, int | None]]:
    """Where the value of each symbol is among the inputs: the position, and the dimension of a tensor."""
    places = {}
    for at, example in enumerate(examples):
        sizes = enumerate(example.shape) if isinstance(example, Tensor) else [(None, example)]
        for dim, size in sizes:
            if isinstance(size, SymInt) and isinstance(expression(size), sympy.Symbol):
                places.setdefault(expression(size), (at, dim))
    return places


def _number(size: sympy.Expr, values: dict) -> int:
    value = size.xreplace({symbol: sympy.Integer(value) for symbol, value in values.items()})
    if not value.is_Integer:
        raise GraphRefusedError(f"a size in it is not known: {size}")
    return int(value)


def _layout(value: Value, at: dict, batch: sympy.Symbol) -> tuple[int, int, int] | None:
    if value.dim is None:
        return None
    if value.outer is None:  # all rows are equal
        return value.dim, 1, _number(value.shape[value.dim] / batch, at)
    return value.dim, _number(value.outer, at), _number(value.inner, at)


# ---- rows ----------------------------------------------------------------------------------------------------------


def _padded(rows: Rows, count: int) -> Rows:
    """The kept rows, and the last of them again and again."""
    padded = Rows(rows.index, rows.batch)
    if count > rows.count:
        padded.index = torch.cat([rows.index, rows.index[-1:].expand(count - rows.count)])
        padded.count, padded.start = count, None
    return padded


def _take(x: Tensor, rows: Rows, layout: tuple, shape: list, strides: list, copy: bool) -> Tensor:
    """The rows of an input, in the memory layout that the graph was compiled for."""
    taken = rows.take(x, *layout)
    rows._last = None  # the graph may reuse the memory of each of its inputs
    fits = all(size == 1 or a == b for size, a, b in zip(shape, taken.stride(), strides, strict=True))
    alias = taken.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    if fits and not (alias and (copy or taken.storage_offset() * taken.element_size() % _ALIGNMENT)):
        return taken
    return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device).copy_(taken)


def _row_sparse(grad: Tensor, rows: Rows, count: int, dim: int, outer: int, inner: int) -> RowSparseTensor:
    if count > rows.count:
        kept = grad.unflatten(dim, (outer, count, inner)).narrow(dim + 1, 0, rows.count)
        grad = kept.flatten(dim, dim + 2)
    return RowSparseTensor(grad, rows, dim, outer, inner)


def _counts_rows(numbers: Tensor) -> bool:
    return torch.equal(numbers, torch.arange(len(numbers), dtype=numbers.dtype, device=numbers.device))
