"""
Step 2 (per-item losses) of: batch → per-item losses → keep decision → trimmed backward → logs.

Loss functions inside a compiled graph cannot be intercepted. A compiled model's loss function is therefore called once
more, outside of the graph, on the logits that the graph returned.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from hf_trim.trainer.heads import PASS_A_LOSS
from hf_trim.trainer.losses import LossCall, LossCalls


def recompute_loss(
    model: nn.Module,
    inputs: Mapping,
    outputs: Mapping,
    returned_loss: float,
    batch_size: int,
    num_items_in_batch: Tensor | int | None,
) -> tuple[Tensor, list[LossCall]]:
    """
    Compute the loss of a compiled model from its outputs.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model, without wrappers.
        inputs (`Mapping`): The batch.
        outputs (`Mapping`): The outputs of the compiled model.
        returned_loss (`float`): The loss that the compiled model returned: the new one must be equal to it.
        batch_size (`int`): Number B of samples.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): Number of labels in the optimizer step.

    Returns:
        `tuple[torch.Tensor, list[LossCall]]`: The scalar loss, and the calls of loss functions that it is made of.

    Raises:
        `ValueError`: If the model's loss function needs what is not there, or gives another loss.
    """
    arguments = {**inputs, **outputs, "config": model.config, "pooled_logits": outputs.get("logits")}
    if outputs.get("logits") is not None:
        arguments["vocab_size"] = outputs["logits"].shape[-1]
    loss_function: Callable[..., Any] = cast(Any, model).loss_function
    names = inspect.signature(loss_function).parameters
    arguments = {name: arguments[name] for name in names if name in arguments}
    # Not every model divides its loss by the number of labels of the step: the returned loss tells.
    for divisor in ({"num_items_in_batch": num_items_in_batch}, {}):
        with LossCalls(batch_size) as losses:
            try:
                loss = loss_function(**arguments, **divisor)
            except TypeError as error:
                raise ValueError(f"The loss of compiled {type(model).__name__} is not known: {error}.") from None
        if abs(loss.item() - returned_loss) <= 1e-3 + 0.01 * abs(returned_loss):
            return loss, losses.calls
    raise ValueError(
        f"The compiled {type(model).__name__} returned the loss {returned_loss:.6g}, and its loss function gives "
        f"{loss.item():.6g} for its logits. Do not compile it, or pass compute_loss_func. {PASS_A_LOSS}"
    )
