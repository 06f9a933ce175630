"""
The private names of torch around `torch.compile` that `_compile_internals.py` uses: each is there, and has the shape
that is expected. Where one fails, this version of torch has changed it.
"""

import pytest
import sympy
import torch
from torch import nn

from hf_trim.backward import _compile_internals as internals
from hf_trim.backward._torch_internals import OpOverload, op_name
from tests.support.compiled import DECOMPOSED


class Compiled:
    """A linear layer that was compiled for any batch size s0: its backward node, AOTAutograd's function and graph."""

    def __init__(self):
        torch._dynamo.reset()
        self.graphs = []

        def backend(graph, inputs):
            self.graphs.append((graph, inputs))
            return torch._dynamo.lookup_backend(DECOMPOSED)(graph, inputs)

        layer = torch.compile(nn.Linear(3, 5), backend=backend, dynamic=True)
        self.input = torch.randn(4, 7, 3, requires_grad=True)
        with internals.without_autograd_cache(), internals.with_a_symbol_for_each_size():
            self.output = layer(self.input)
        self.node = self.output.grad_fn
        self.function = internals.aot_function(self.node)
        self.graph = self.function and internals.aot_backward_graph(self.function)


@pytest.fixture(scope="module")
def compiled():
    return Compiled()


def has(owner, *names):
    """Fails with the names that are missing."""
    missing = [name for name in names if not hasattr(owner, name)]
    assert not missing, f"torch {torch.__version__}: {owner!r} has no {', '.join(missing)}"


def expect(condition, sentence):
    assert condition, f"torch {torch.__version__}: {sentence}"


def test_inductors_options():
    has(torch._inductor, "list_mode_options")
    options = internals.inductor_options("reduce-overhead")
    expect(options.get("triton.cudagraphs") is True, f"mode 'reduce-overhead' has no CUDA graphs, but {options}")


def test_inductors_compiler():
    from torch._inductor import compile_fx

    has(compile_fx, "compile_fx")
    expect("config_patches" in compile_fx.compile_fx.__code__.co_varnames, "compile_fx takes no config_patches")


def test_the_autograd_cache_can_be_switched_off():
    from torch._functorch import config

    has(config, "enable_autograd_cache", "patch")
    with internals.without_autograd_cache():
        expect(config.enable_autograd_cache is False, "the patch of enable_autograd_cache has no effect")


def test_equal_sizes_can_have_a_symbol_each():
    from torch.fx.experimental import _config

    has(_config, "use_duck_shape", "patch")
    with internals.with_a_symbol_for_each_size():
        expect(_config.use_duck_shape is False, "the patch of use_duck_shape has no effect")


def test_a_dimension_can_be_marked_as_dynamic():
    has(torch._dynamo, "maybe_mark_dynamic")
    internals.mark_dynamic_if_possible(torch.randn(4, 3), 0)


@pytest.mark.parametrize("in_place", [True, False])
def test_the_options_that_a_module_was_compiled_with(in_place):
    module = nn.Linear(2, 2)
    has(module, "_compiled_call_impl")
    expect(internals.inductor_configs(module) == [], "a module that was not compiled has options of inductor")
    if in_place:
        module.compile(mode="reduce-overhead")
    else:
        module = torch.compile(module, mode="reduce-overhead")
    configs = internals.inductor_configs(module)
    expect(len(configs) == 1 and configs[0].get("triton.cudagraphs"), f"inductor's options are {configs}")


def test_compiled_modules():
    has(torch._dynamo, "OptimizedModule")
    module = nn.Linear(2, 2)
    has(module, "_compiled_call_impl")
    compiled = torch.compile(module)
    expect(internals.without_compilation(compiled) is module, "_orig_mod is not what was compiled")
    expect(internals.compiled_modules(compiled) == [compiled], "torch.compile gives no OptimizedModule")
    module.compile()
    expect(internals.compiled_modules(nn.Sequential(module)) == [module], "Module.compile sets no _compiled_call_impl")


def test_a_compiled_graphs_node_is_known_by_its_function(compiled):
    has(compiled.node, "_forward_cls", "metadata")
    has(compiled.node._forward_cls, "_lazy_backward_info", "_backward_impl", "metadata")
    expect(compiled.function is compiled.node._forward_cls, "the node has another function")
    expect(internals.aot_function((compiled.output * 2).grad_fn) is None, "a node of ATen is taken for a graph")


def test_the_backward_graph_is_kept(compiled):
    info = compiled.function._lazy_backward_info
    has(info, "bw_module", "placeholder_list")
    expect(isinstance(compiled.graph, torch.fx.Graph), f"bw_module has no graph: {info.bw_module!r}")
    nodes = list(compiled.graph.nodes)
    expect(all(internals.is_traced(node) for node in nodes if node.op == "placeholder"), "inputs have no meta['val']")
    ops = [node.target for node in nodes if node.op == "call_function"]
    names = {op_name(op) for op in ops if isinstance(op, OpOverload)}
    expect("mm" in names, f"the backward graph of a linear layer has no mm, but {names}")


def test_the_inputs_of_the_backward_graph(compiled):
    inputs = internals.aot_backward_inputs(compiled.function, compiled.graph)
    expect(len(inputs) == len(compiled.graph.find_nodes(op="placeholder")), "inputs are missing in placeholder_list")
    expect(
        all(isinstance(x, (torch.Tensor, torch.SymInt, int)) for x in inputs),
        f"an input is no tensor and no size: {[type(x) for x in inputs]}",
    )
    positions = internals.aot_gradient_inputs(compiled.graph)
    expect(len(positions) == 1, f"one input is the gradient of the output, but these have its name: {positions}")
    expect(inputs[positions[0]].shape[2] == 5, "the input named 'tangents' has not the shape of the output")


@pytest.mark.parametrize(
    "name", ["input_info", "mutated_inp_runtime_indices", "output_info", "num_outputs", "num_intermediate_bases"]
)
def test_what_aot_autograd_says_of_a_graph(name, compiled):
    has(compiled.function.metadata, name)


@pytest.mark.parametrize("name", ["output_type", "raw_type", "requires_grad"])
def test_what_aot_autograd_says_of_an_output(name, compiled):
    has(compiled.function.metadata.output_info[0], name)


@pytest.mark.parametrize("name", ["mutates_data", "requires_grad"])
def test_what_aot_autograd_says_of_an_input(name, compiled):
    has(compiled.function.metadata.input_info[0], name)


def test_the_outputs_whose_gradients_are_inputs(compiled):
    positions = internals.aot_outputs_with_gradients(compiled.function)
    expect(positions == [0], f"a layer has the output 0, but these have gradients: {positions}")


def test_the_backward_pass_can_be_replaced(compiled):
    calls, run = [], internals.aot_backward(compiled.function)

    def replacement(ctx, args):
        has(ctx, "maybe_clear_saved_tensors", "metadata")
        calls.append(list(args))
        internals.free_saved_tensors(ctx)
        return run(ctx, args)

    internals.replace_aot_backward(compiled.function, replacement)
    (grad,) = torch.autograd.grad(compiled.output.sum(), compiled.input)
    expect(len(calls) == 1, "the backward pass of a compiled graph is not called through _backward_impl")
    count = len(compiled.graph.find_nodes(op="placeholder"))
    expect(len(calls[0]) == count, f"the backward graph has {count} inputs, and is called with {len(calls[0])}")
    assert grad.shape == compiled.input.shape
    has(compiled.function, "compiled_bw")
    expect(internals.aot_backward_is_compiled(compiled.function), "compiled_bw is None after a backward pass")


def test_sizes_are_formulas_of_symbols(compiled):
    inputs = internals.aot_backward_inputs(compiled.function, compiled.graph)
    gradient = inputs[internals.aot_gradient_inputs(compiled.graph)[0]]
    batch, length = (internals.size_expression(size) for size in gradient.shape[:2])
    expect(isinstance(batch, sympy.Symbol) and batch != length, f"the sizes of a gradient are {batch} and {length}")
    assert internals.size_expression(5) == 5


def test_the_op_that_a_saved_tensor_came_from():
    def losses(x):
        numbers = torch.arange(len(x), device=x.device)
        return (x[numbers, 1] * x[len(x) - 1 - numbers, 0]).sin()

    torch._dynamo.reset()
    for backend in ("aot_eager", DECOMPOSED):
        call = torch.compile(losses, backend=backend, dynamic=True)
        with internals.without_autograd_cache(), internals.with_a_symbol_for_each_size():
            node = call(torch.randn(4, 7, requires_grad=True)).grad_fn
        inputs = internals.aot_backward_graph(internals.aot_function(node)).find_nodes(op="placeholder")
        ranges = [x for x in inputs if internals.is_range(x)]
        expect(
            len(ranges) == 1 and ranges[0].meta["val"].dtype == torch.int64, f"meta['original_aten'] tells {ranges}"
        )


def test_assumptions_on_sizes(compiled):
    inputs = internals.aot_backward_inputs(compiled.function, compiled.graph)
    size = inputs[internals.aot_gradient_inputs(compiled.graph)[0]].shape[0]
    has(size, "node")
    has(size.node, "expr", "shape_env")
    has(size.node.shape_env, "guards", "replace", "var_to_range")
    conditions, least = internals.size_assumptions(size, internals.size_expression(size))
    expect(least in (0, 1, 2), f"the least batch size of a graph for all of them is {least}")
    values = {internals.size_expression(size): sympy.Integer(3)}
    expect(all(isinstance(condition, sympy.Basic) for condition in conditions), f"guards are {conditions}")
    assert all(condition.xreplace(values) != sympy.false for condition in conditions)
