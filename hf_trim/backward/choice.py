"""Which backward pass suits a model."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


# With backward twice as dear as forward, a step with a second forward pass on the kept part takes (1 + 3p)/3 of dense.
REPLAY_BELOW = 2 / 3


def mixing_modules(model: nn.Module) -> list[str]:
    """
    Modules through which the samples of a batch see each other in training.

    Args:
        model (`torch.nn.Module`): The model, in training mode.

    Returns:
        `list[str]`: Names of the batch-norm modules that use the batch's own statistics; frozen ones do not.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    ]


def is_compiled(model: nn.Module) -> bool:
    """
    Args:
        model (`torch.nn.Module`): The model.

    Returns:
        `bool`: Whether it, or a part of it, was compiled with `torch.compile`.
    """
    return any(
        isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
        for module in model.modules()
    )


def choose_backward(
    asked: str, model: nn.Module, per_sample: bool, keep: float, chunked_head: bool = False, refused: str = ""
) -> tuple[str, str]:
    """
    The backward pass to run: the one asked for, or with `"auto"` the fastest exact one.

    Args:
        asked (`str`): `"auto"`, `"dense"`, `"sparse"` or `"replay"`.
        model (`torch.nn.Module`): The model, in training mode.
        per_sample (`bool`): Whether items are samples; if not, they are tokens.
        keep (`float`): Fraction p that is kept, below 1.
        chunked_head (`bool`, *optional*, defaults to `False`): Whether the last layer's gradient is computed for the
            kept tokens only (`lm_head.py`).
        refused (`str`, *optional*): Why a compiled graph of the model cannot run on the kept rows (`compiled.py`), as
            far as is known.

    Returns:
        `tuple[str, str]`: `"dense"`, `"sparse"` or `"replay"`, and the reason.
    """
    if not per_sample and asked != "dense":
        if chunked_head:
            return "dense", "a model mixes tokens; but its head's gradient is that of the kept tokens only"
        return "dense", "a model mixes tokens, and the gradient of all of them is not zero"
    mixing = [] if asked == "dense" else mixing_modules(model)
    mixed = f"{len(mixing)} batch-norm modules ({', '.join(mixing[:1])}, ...) mix the samples of a batch"
    if asked != "auto":
        effects = {
            "sparse": f"asked for, but {mixed}: behind them it is dense, and saves nothing",
            "replay": f"asked for, but {mixed}: they see the kept ones only, and gradients are not those of dense",
        }
        return asked, effects[asked] if mixing else "asked for"
    if mixing:
        return "dense", mixed
    if refused and keep < REPLAY_BELOW:
        return "replay", f"a compiled graph cannot run on the kept rows: {refused}"
    if refused:
        return "dense", f"a compiled graph cannot run on the kept rows, and replay would cost more: {refused}"
    return "sparse", "no module mixes the samples of a batch"
