"""Mini-batch trimming for any PyTorch loop, in one line."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_trim.backward import BACKWARD_CHOICES, take_kept
from hf_trim.backward.replay import scoring
from hf_trim.messages import check_choice
from hf_trim.trainer.lm_head import LazyLogits
from hf_trim.trainer.selection import NONFINITE_CHOICES, SELECT_CHOICES, select_items


def _check_keep(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be a fraction in (0, 1], and is {keep}: 0.2 keeps the hardest fifth.")


def trimmed_mean(
    losses: Tensor | Callable[[Tensor | None], Tensor],
    keep: float,
    *,
    valid: Tensor | None = None,
    select: str = "hardest",
    backward: str = "dense",
    nonfinite: str = "error",
    generator: torch.Generator | None = None,
    model: nn.Module | None = None,
) -> Tensor:
    """
    The mean over the hardest fraction of a mini-batch (arXiv 2110.13058, section 2): use it in place of
    `losses.mean()`.

    ```python
    losses = torch.nn.functional.cross_entropy(model(images), labels, reduction="none")
    trimmed_mean(losses, keep=0.4, backward="sparse").backward()
    ```

    Args:
        losses (`torch.Tensor` or `Callable`): Unreduced losses of any shape, e.g. `[B]` per sample or `[B, T]` per
            token. For `backward="replay"` a function instead, from the `[k]` indices of samples (`None`: all of them)
            to their losses.
        keep (`float`): Fraction p of the valid items to keep, in (0, 1]; k = max(1, round(p·n)).
        valid (`torch.Tensor`, *optional*): Boolean mask of the shape of `losses`, e.g. `labels != -100`; the rest
            are no items.
        select (`str`, *optional*, defaults to `"hardest"`): `"hardest"`, `"random"` (a random subset of the same
            size) or `"none"` (the plain mean).
        backward (`str`, *optional*, defaults to `"dense"`): `"dense"` for ordinary autograd, `"sparse"` (`"auto"` is
            the same here) for a backward pass that costs what is kept, with the same gradients, also of what
            `torch.compile(..., backend="hf_trim", dynamic=True)` made; `"replay"` to score without gradients, then run
            forward and backward on the kept samples, which needs their memory only but draws dropout masks anew.
        nonfinite (`str`, *optional*, defaults to `"error"`): What to do with losses that are NaN or infinite: raise an
            `"error"`, or `"drop"` them. Where activations are not finite either, only `"sparse"` and `"replay"` keep
            them out of the gradients.
        generator (`torch.Generator`, *optional*): Source of the random subset, on the CPU; the default is torch's.
        model (`torch.nn.Module`, *optional*): For `"replay"`: the model that `losses` calls.

    Returns:
        `torch.Tensor`: The scalar loss, in the data type of `losses`; zero if no item is valid.

    Raises:
        `ValueError`: If an argument is out of its range, or a loss is not finite.
    """
    check_choice("select", select, SELECT_CHOICES)
    check_choice("backward", backward, BACKWARD_CHOICES)
    check_choice("nonfinite", nonfinite, NONFINITE_CHOICES)
    if (backward == "replay") != callable(losses) or (backward == "replay") != (model is not None):
        raise ValueError(
            'backward="replay" runs the model twice: give it, and it alone, a function as losses (indices of samples, '
            "or None for all, to their losses) and the model."
        )
    losses_of = losses
    if backward == "replay":
        with scoring(model):
            losses = losses_of(None)
    if not losses.is_floating_point() or losses.dim() == 0:
        raise ValueError(
            f"trimmed_mean needs unreduced floating-point losses, e.g. [B] or [B, T], and got {losses.dtype} of shape "
            f'{list(losses.shape)}: compute the loss with reduction="none".'
        )
    _check_keep(keep)
    if valid is not None and (valid.shape != losses.shape or valid.dtype != torch.bool):
        raise ValueError(
            f"valid must be a boolean mask of the losses' shape {list(losses.shape)}, and is {valid.dtype} of shape "
            f"{list(valid.shape)}."
        )
    bad = ~losses.detach().isfinite()
    if valid is not None:
        bad &= valid
    if (count := int(bad.sum())) and nonfinite == "error":
        raise ValueError(
            f"{count} of {losses.numel()} losses are NaN or infinite, and ranking them means nothing. "
            'nonfinite="drop" leaves them out.'
        )
    if count:
        valid = ~bad if valid is None else valid & ~bad
    kept = select_items(losses, keep, valid=valid, select=select, generator=generator)
    if backward == "replay":
        # Without a valid item the first sample stands in, so that there is a graph.
        return losses_of(kept).mean() if kept.numel() else losses_of(kept.new_zeros(1)).sum() * 0
    if kept.numel() == 0:
        return losses.sum() * 0
    return take_kept(losses, kept, backward).mean()


def trimmed_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    keep: float,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    select: str = "hardest",
    generator: torch.Generator | None = None,
) -> Tensor:
    """
    The last layer of a language model, cross entropy, and the mean over the hardest fraction of the tokens, of which
    only a chunk of logits is ever in memory. Tokens are scored without a graph; gradients are computed for the kept.

    ```python
    hidden = model.model(input_ids).last_hidden_state[:, :-1]
    trimmed_linear_cross_entropy(hidden, model.lm_head.weight, labels[:, 1:], keep=0.2).backward()
    ```

    Args:
        hidden (`torch.Tensor`): `[..., H]` inputs of the layer.
        weight (`torch.Tensor`): `[V, H]` weight of the layer.
        target (`torch.Tensor`): `[...]` classes, or `ignore_index`: no item.
        keep (`float`): Fraction p of the tokens to keep, in (0, 1]; k = max(1, round(p·n)).
        bias (`torch.Tensor`, *optional*): `[V]` bias of the layer.
        ignore_index (`int`, *optional*, defaults to -100): The target that means that there is none.
        label_smoothing (`float`, *optional*, defaults to 0.0): As in `torch.nn.functional.cross_entropy`.
        select (`str`, *optional*, defaults to `"hardest"`): `"hardest"`, `"random"` or `"none"`.
        generator (`torch.Generator`, *optional*): Source of the random subset, on the CPU; the default is torch's.

    Returns:
        `torch.Tensor`: The scalar loss in float32 at least; zero if there is no target. It has one backward pass.

    Raises:
        `ValueError`: If an argument is out of its range, shapes do not match, or a loss is not finite.
    """
    check_choice("select", select, SELECT_CHOICES)
    _check_keep(keep)
    if hidden.shape[:-1] != target.shape or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"Expected hidden [..., H], weight [V, H] and target [...]; got {list(hidden.shape)}, "
            f"{list(weight.shape)} and {list(target.shape)}."
        )
    logits = LazyLogits(hidden.flatten(0, -2), weight, bias, keep_all=keep == 1 or select == "none")
    target = target.flatten()
    losses = logits.score(target, ignore_index=ignore_index, label_smoothing=label_smoothing)
    valid = target != ignore_index
    if not (finite := losses.isfinite()).all():
        raise ValueError(f"{int((~finite).sum())} of {losses.numel()} losses are NaN or infinite: see trimmed_mean.")
    kept = select_items(losses, keep, valid=valid, select=select, generator=generator)
    return logits.sum_of(kept) / kept.numel() if kept.numel() else hidden.sum() * 0
