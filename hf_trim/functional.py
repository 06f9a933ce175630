"""Mini-batch trimming for any PyTorch loop, in one line."""

import torch
from torch import Tensor

from hf_trim.backward import BACKWARD_CHOICES, take_kept
from hf_trim.messages import check_choice
from hf_trim.selection import SELECT_CHOICES, select_items


def trimmed_mean(
    losses: Tensor,
    keep: float,
    *,
    valid: Tensor | None = None,
    select: str = "hardest",
    backward: str = "dense",
    generator: torch.Generator | None = None,
) -> Tensor:
    """
    The mean over the hardest fraction of a mini-batch (arXiv 2110.13058, section 2): use it in place of
    `losses.mean()`.

    ```python
    losses = torch.nn.functional.cross_entropy(model(images), labels, reduction="none")
    trimmed_mean(losses, keep=0.4).backward()
    ```

    Args:
        losses (`torch.Tensor`): Unreduced losses of any shape, e.g. `[B]` per sample or `[B, T]` per token.
        keep (`float`): Fraction p of the valid items to keep, in (0, 1]; k = max(1, round(p·n)).
        valid (`torch.Tensor`, *optional*): Boolean mask of the shape of `losses`, e.g. `labels != -100`; the rest
            are no items.
        select (`str`, *optional*, defaults to `"hardest"`): `"hardest"`, `"random"` (a random subset of the same
            size) or `"none"` (the plain mean).
        backward (`str`, *optional*, defaults to `"dense"`): How the backward pass is run; the result is the same.
        generator (`torch.Generator`, *optional*): Source of the random subset, on the CPU; the default is torch's.

    Returns:
        `torch.Tensor`: The scalar loss, in the data type of `losses`; zero if no item is valid.

    Raises:
        `ValueError`: If an argument is out of its range.
    """
    if not losses.is_floating_point() or losses.dim() == 0:
        raise ValueError(
            f"trimmed_mean needs unreduced floating-point losses, e.g. [B] or [B, T], and got {losses.dtype} of shape "
            f'{list(losses.shape)}: compute the loss with reduction="none".'
        )
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be a fraction in (0, 1], and is {keep}: 0.2 keeps the hardest fifth.")
    if valid is not None and (valid.shape != losses.shape or valid.dtype != torch.bool):
        raise ValueError(
            f"valid must be a boolean mask of the losses' shape {list(losses.shape)}, and is {valid.dtype} of shape "
            f"{list(valid.shape)}."
        )
    check_choice("select", select, SELECT_CHOICES)
    check_choice("backward", backward, BACKWARD_CHOICES)
    kept = select_items(losses, keep, valid=valid, select=select, generator=generator)
    if kept.numel() == 0:
        return losses.sum() * 0
    return take_kept(losses, kept, backward).mean()
