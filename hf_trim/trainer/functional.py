"""
Steps 3 and 4 of: batch → per-item losses → keep decision → trimmed backward → logs.

Mini-batch trimming in one line, for a training loop of your own. For example, losses `[8]` and keep = 0.25: the scalar
mean over the 2 highest losses.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from hf_trim.backward import BACKWARD_CHOICES, take_kept, waiting
from hf_trim.backward.replay import scoring
from hf_trim.messages import check_choice
from hf_trim.trainer.kept import Kept
from hf_trim.trainer.lm_head import LazyLogits, LMHead
from hf_trim.trainer.selection import (
    NONFINITE_CHOICES,
    SELECT_CHOICES,
    num_kept,
    places,
    select_items,
    top_mask,
)


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
    `losses.mean()`. It is also known as top-k loss or average top-k loss (Fan et al., arXiv 1705.08826), as CVaR
    (conditional value at risk), and, with fixed k, as online hard example mining (OHEM; Shrivastava et al., arXiv
    1604.03540). It is not the trimmed mean of statistics, which leaves out the lowest *and* the highest values.

    ```python
    losses = torch.nn.functional.cross_entropy(model(images), labels, reduction="none")
    trimmed_mean(losses, keep=0.4, backward="sparse").backward()
    ```

    Args:
        losses (`torch.Tensor` or `Callable`): Unreduced losses of any shape, e.g. `[B]` per sample or `[B, T]` per
            token. For `backward="replay"` a function that takes the `[k]` indices of samples, or `None` for all of
            them, and returns their losses.
        keep (`float`): Fraction p of the valid items to keep, in (0, 1]; k = max(1, round(p·n)).
        valid (`torch.Tensor`, *optional*): Boolean mask of the shape of `losses`, e.g. `labels != -100`; the rest
            are no items, and are never kept.
        select (`str`, *optional*, defaults to `"hardest"`): `"hardest"`, `"random"` (a random subset of the same
            size) or `"none"` (the plain mean).
        backward (`str`, *optional*, defaults to `"dense"`): `"dense"` is ordinary autograd. `"sparse"` (`"auto"` is
            the same here) costs only what is kept and has the same gradients, also in a model compiled by
            `torch.compile(..., backend="hf_trim", dynamic=True)`. `"replay"` computes the losses without gradients,
            then runs forward and backward on the kept samples; it needs the memory of these only, but draws dropout
            masks anew.
        nonfinite (`str`, *optional*, defaults to `"error"`): What to do with losses that are NaN or infinite: raise an
            `"error"`, or `"drop"` them. On a GPU the host would have to wait to raise one: there the result is NaN, as
            a plain mean would be, and so are its gradients. If activations are not finite either, only the backward
            passes `"sparse"` and `"replay"` keep dropped losses out of the gradients.
        generator (`torch.Generator`, *optional*): Source of the random subset, on the CPU; the default is torch's.
        model (`torch.nn.Module`, *optional*): For `"replay"`: the model that `losses` calls.

    Returns:
        `torch.Tensor`: The scalar loss, in the data type of `losses`; zero if no item is valid.

    Raises:
        `ValueError`: If an argument is out of its range, or a loss is not finite (on a GPU, see `nonfinite`).
    """
    check_choice("select", select, SELECT_CHOICES)
    check_choice("backward", backward, BACKWARD_CHOICES)
    check_choice("nonfinite", nonfinite, NONFINITE_CHOICES)
    if (backward == "replay") != callable(losses) or (backward == "replay") != (model is not None):
        raise ValueError(
            'backward="replay" runs the model twice: give it, and it alone, a function as losses (indices of samples, '
            "or None for all, to their losses) and the model."
        )
    losses_of = cast("Callable[[Tensor | None], Tensor]", losses)  # it is one with "replay", and else is not called
    if backward == "replay":
        with scoring(cast(nn.Module, model)):
            losses = losses_of(None)
    losses = cast(Tensor, losses)
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
    not_finite = ~losses.detach().isfinite()
    if valid is not None:
        not_finite &= valid
    if not waiting.reads_freely(losses.device) and nonfinite == "error":
        if valid is None or backward == "replay":  # which runs the kept samples alone: their number must be known
            mean = _mean_of_kept(losses, losses_of, keep, valid, select, backward, generator)
        else:
            mean = _mean_of_valid(losses, keep, valid, select, backward, generator)
        return mean * _nan_if(not_finite.any(), mean)
    if (count := int(not_finite.sum())) and nonfinite == "error":
        raise ValueError(
            f"{count} of {losses.numel()} losses are NaN or infinite, and ranking them means nothing. "
            'nonfinite="drop" leaves them out.'
        )
    if count:
        valid = ~not_finite if valid is None else valid & ~not_finite
    return _mean_of_kept(losses, losses_of, keep, valid, select, backward, generator)


def _mean_of_kept(
    losses: Tensor,
    losses_of: Callable[[Tensor | None], Tensor],
    keep: float,
    valid: Tensor | None,
    select: str,
    backward: str,
    generator: torch.Generator | None,
) -> Tensor:
    kept = select_items(losses, keep, valid=valid, select=select, generator=generator)
    if backward == "replay":
        # Without a valid item the first sample stands in, so that there is a graph.
        return losses_of(kept).mean() if kept.numel() else losses_of(kept.new_zeros(1)).sum() * 0
    if kept.numel() == 0:
        return losses.sum() * 0
    return take_kept(losses, kept, backward).mean()


def _mean_of_valid(
    losses: Tensor, keep: float, valid: Tensor, select: str, backward: str, generator: torch.Generator | None
) -> Tensor:
    """
    The same where the device alone knows how many items are valid. As many losses are taken as may be kept at most;
    those that are not kept count nothing.
    """
    losses, valid = losses.flatten(), valid.flatten()
    count, most = valid.sum(), losses.numel()
    if select != "none":
        count, most = num_kept(keep, count), num_kept(keep, most)
    chosen = top_mask(losses, count, valid, select=select, generator=generator)
    kept = places(chosen, most)
    is_kept = chosen[kept]
    return (take_kept(losses, kept, backward).where(is_kept, 0) / is_kept.sum().clamp(min=1)).sum()


def _nan_if(condition: Tensor, like: Tensor) -> Tensor:
    """A factor: NaN if the condition is met, else 1."""
    return torch.ones_like(like, requires_grad=False).masked_fill(condition, torch.nan)


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
    The last layer of a language model, cross entropy, and the mean over the hardest fraction of the tokens. Logits are
    computed in chunks, so that never all of them are in memory. First all tokens are scored without gradients, then
    the gradients of the kept tokens are computed.

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
        ignore_index (`int`, *optional*, defaults to -100): The target that means "no label".
        label_smoothing (`float`, *optional*, defaults to 0.0): As in `torch.nn.functional.cross_entropy`.
        select (`str`, *optional*, defaults to `"hardest"`): `"hardest"`, `"random"` or `"none"`.
        generator (`torch.Generator`, *optional*): Source of the random subset, on the CPU; the default is torch's.

    Returns:
        `torch.Tensor`: The scalar loss in float32 at least; zero if there is no target. Its backward pass can be run
            more than once.

    Raises:
        `ValueError`: If an argument is out of its range, shapes do not match, or a loss is not finite. On a GPU the
            result is NaN then, see [`trimmed_mean`]; the host waits once, for the number of targets, and with a `keep`
            above 0.8 and below 1 in the backward pass, too.
    """
    check_choice("select", select, SELECT_CHOICES)
    _check_keep(keep)
    if hidden.shape[:-1] != target.shape or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"Expected hidden [..., H], weight [V, H] and target [...]; got {list(hidden.shape)}, "
            f"{list(weight.shape)} and {list(target.shape)}."
        )
    target = target.flatten()
    valid, is_free = target != ignore_index, waiting.reads_freely(hidden.device)
    num_valid = waiting.Later(valid.sum())
    head = LMHead(weight, 1.0 if select == "none" else keep, None if is_free else num_valid)
    logits = LazyLogits(hidden.flatten(0, -2), weight, bias, head=head)
    losses = logits.score(target, ignore_index=ignore_index, label_smoothing=label_smoothing)
    not_finite, factor = ~losses.isfinite(), losses.new_ones(())
    if not is_free:
        factor = _nan_if(not_finite.any(), factor)
    elif count := int(not_finite.sum()):
        raise ValueError(f"{count} of {losses.numel()} losses are NaN or infinite: see trimmed_mean.")
    n = int(num_valid.read())
    count = n if select == "none" else num_kept(keep, n)
    if not count:
        return hidden.sum() * 0
    chosen = top_mask(losses, count, valid, select=select, generator=generator)
    kept = places(chosen, None if is_free else count)
    return logits.attach(losses[kept].mean() * factor, lambda grad: Kept(kept, grad * factor / count))
