"""
Score first, without gradients; then forward and backward on the kept samples only, with the memory of those.

e.g. images `[B, 3, H, W]`, B = 4: a forward pass under [`scoring`] gives the losses `[4]`. Samples 1 and 3 are kept,
[`rows_of`] makes `[2, 3, H, W]` of the images, and the model is trained on these as on any batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_trim.backward._torch_internals import BatchNorm, tree_map_only


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """
    Forward passes in this context compute losses and leave no trace: there is no graph, and random number generators
    and batch-norm statistics are as before when it ends. What follows draws the same dropout masks as without it.

    Args:
        model (`torch.nn.Module`): The model, in training mode as for training itself.
    """
    statistics = [
        (buffer, buffer.clone())
        for module in model.modules()
        if isinstance(module, BatchNorm) and module.training
        for buffer in module.buffers(recurse=False)
    ]
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta", "mps")}
    kind = next(iter(devices)).type if devices else "cuda"
    try:
        with torch.random.fork_rng([device.index for device in devices], device_type=kind), torch.no_grad():
            yield
    finally:
        torch.clear_autocast_cache()  # or training would use the weights that were cast here, without a graph
        for buffer, value in statistics:
            buffer.copy_(value)


def rows_of(inputs: Any, kept: Tensor, batch_size: int) -> Any:
    """
    The kept samples of a batch.

    Args:
        inputs: The model's inputs: tensors whose first dimension is the batch and whatever else, also in dictionaries,
            lists and tuples.
        kept (`torch.Tensor`): `[k]` indices of samples.
        batch_size (`int`): Size B of that dimension.

    Returns:
        The same inputs with `[k, ...]` in place of `[B, ...]`.
    """

    def take(value: Tensor) -> Tensor:
        has_rows = value.dim() > 0 and value.shape[0] == batch_size
        return value.index_select(0, kept.to(value.device)) if has_rows else value

    return tree_map_only(Tensor, take, inputs)
