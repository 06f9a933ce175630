"""
Compiling a model so that its backward graph can run on the kept rows.

Example: `torch.compile(losses_of, backend="hf_trim", dynamic=True)` is called with images `[32, 3, 8, 8]` and returns
losses `[32]`. The graph is compiled for `[s0, 3, 8, 8]`. In later steps, its backward part runs for 20, 13 or 7 kept
rows of 32 without another compilation. With a batch of 8 images, s0 would be 8 as well as the height; but each size
has a symbol of its own here, so that the rows can be told from the height.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_trim.backward._compile_internals import (
    compile_with_inductor,
    inductor_configs,
    inductor_options,
    mark_dynamic_if_possible,
    with_a_symbol_for_each_size,
    without_autograd_cache,
)


CUDA_GRAPHS = (
    "a CUDA graph replays one batch size, and the number of kept rows changes with p (mode='default' and "
    "'max-autotune-no-cudagraphs' have none)"
)


def hf_trim_backend(
    graph: torch.fx.GraphModule, inputs: list, mode: str | None = None, options: dict | None = None
) -> Callable:
    """
    A backend for `torch.compile`: inductor, with a backward pass that can run on the kept rows.

    ```python
    losses_of = torch.compile(losses_of, backend="hf_trim", dynamic=True)
    trimmed_mean(losses_of(batch), keep=0.2, backward="sparse").backward()
    ```

    Args:
        graph (`torch.fx.GraphModule`): What Dynamo traced.
        inputs (`list`): Its inputs.
        mode (`str`, *optional*): A mode of `torch.compile` without CUDA graphs.
        options (`dict`, *optional*): Inductor's options, as for `torch.compile`.

    Returns:
        `Callable`: The compiled graph.

    Raises:
        `ValueError`: If the mode or the options ask for CUDA graphs.
    """
    options = {**(inductor_options(mode) if mode else {}), **(options or {})}
    if options.get("triton.cudagraphs"):
        raise ValueError(f"backend='hf_trim' compiles without CUDA graphs: {CUDA_GRAPHS}.")
    with keep_backward_graphs():
        return compile_with_inductor(graph, inputs, options)


@contextmanager
def keep_backward_graphs() -> Iterator[None]:
    """
    Graphs that are compiled in this context can be proved later: AOTAutograd keeps the backward graph, which its cache
    would drop, and a batch size and a length that are equal at first are told apart.
    """
    with without_autograd_cache(), with_a_symbol_for_each_size():
        yield


def uses_cuda_graphs(model: torch.nn.Module) -> bool:
    """
    Args:
        model (`torch.nn.Module`): A model.

    Returns:
        `bool`: Whether the model, or a part of it, was compiled in a mode that records CUDA graphs.
    """
    return any(config.get("triton.cudagraphs") for module in model.modules() for config in inductor_configs(module))


def mark_batch_dynamic(inputs: Mapping, size: int) -> None:
    """
    Graphs that are compiled for these inputs will serve other batch sizes too, if their code allows for it.

    Args:
        inputs (`Mapping`): The model's inputs: tensors whose first dimension is the batch, and other values.
        size (`int`): Batch size B.
    """
    for value in inputs.values():
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == size > 1:
            mark_dynamic_if_possible(value, 0)
