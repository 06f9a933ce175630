"""
Which backward pass suits a model.

e.g. a model without batch norm on `[B, T]` token ids: its samples do not depend on each other, and where samples are
kept, `"auto"` is `"sparse"`. Where single tokens are kept it is `"dense"`: attention over T makes each token's output
depend on the others of its sample, so that none of the `[B, T, C]` gradients is zero.
"""

from torch import nn

from hf_trim.backward._compile_internals import is_compiled_module
from hf_trim.backward._torch_internals import BatchNorm


# A backward pass costs twice a forward pass. One more forward pass, then both on the kept part, take (1 + 3p)/3 of the
# dense step.
REPLAY_BELOW = 2 / 3


def find_mixing_modules(model: nn.Module) -> list[str]:
    """
    Finds the modules that make the samples of a batch depend on each other in training.

    Args:
        model (`torch.nn.Module`): The model, in training mode.

    Returns:
        `list[str]`: Names of the batch-norm modules that use the batch's own statistics; frozen ones do not.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) and (module.training or module.running_mean is None)
    ]


def is_compiled(model: nn.Module) -> bool:
    """
    Args:
        model (`torch.nn.Module`): The model.

    Returns:
        `bool`: Whether it, or a part of it, was compiled with `torch.compile`.
    """
    return any(is_compiled_module(module) for module in model.modules())


def choose_backward(
    requested: str, model: nn.Module, per_sample: bool, keep: float, chunked_head: bool = False, refusal: str = ""
) -> tuple[str, str]:
    """
    The backward pass to run: the one asked for, or with `"auto"` the fastest exact one.

    Args:
        requested (`str`): `"auto"`, `"dense"`, `"sparse"` or `"replay"`.
        model (`torch.nn.Module`): The model, in training mode.
        per_sample (`bool`): Whether items are samples; if not, they are tokens.
        keep (`float`): Fraction p that is kept, below 1.
        chunked_head (`bool`, *optional*, defaults to `False`): Whether the last layer's gradient is computed for the
            kept tokens only.
        refusal (`str`, *optional*): Why a compiled graph of the model cannot run on the kept rows (`compiled/`), if
            one was met that cannot.

    Returns:
        `tuple[str, str]`: `"dense"`, `"sparse"` or `"replay"`, and the reason.
    """
    if not per_sample and requested != "dense":
        reason = "tokens of one sample depend on each other, so every token has a gradient"
        if chunked_head:
            reason += "; only the language-model head is computed for the kept tokens alone"
        return "dense", reason
    mixing = [] if requested == "dense" else find_mixing_modules(model)
    names = ", ".join(mixing[:1]) + (", ..." if len(mixing) > 1 else "")
    mixed = f"batch-norm modules ({names}) mix the samples of a batch"
    if requested != "auto":
        effects = {
            "sparse": f"asked for, but {mixed}: below them every sample has a gradient, and nothing is saved",
            "replay": f"asked for, but {mixed}: they see kept samples only, so gradients differ from those of dense",
        }
        return requested, effects[requested] if mixing else "asked for"
    if mixing:
        return "dense", f"{mixed}, so every sample has a gradient"
    if refusal:
        reason = f"a compiled graph cannot run on the kept rows: {refusal}"
        if keep < REPLAY_BELOW:
            return "replay", reason
        return "dense", f"{reason}; a second forward pass (replay) would cost more than it saves"
    return "sparse", "no module mixes the samples of a batch"
