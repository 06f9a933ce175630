"""
Step 3 (keep decision) of: batch → per-item losses → keep decision → trimmed backward → logs.

A replay computes the loss twice: the first pass, without gradients, chooses what is kept, and the calls of loss
functions in the second one take this over. For example, the first pass had losses `[8]` and kept samples 1 and 6; the
second runs these two alone, and keeps both of its losses `[2]`.
"""

import torch

from hf_trim.trainer.kept import Kept
from hf_trim.trainer.losses import LossCall


def adopt(call: LossCall, calls: list[LossCall]) -> None:
    """
    Let a call of the second pass keep what the first one has chosen of the same call.

    Args:
        call ([`~hf_trim.trainer.losses.LossCall`]): The call. It is changed.
        calls (`list`): Those of the first pass that are left. The one that is the same is taken out of it.

    Raises:
        `ValueError`: If there is none.
    """
    while calls and (calls[0].kind, calls[0].reduction) != (call.kind, call.reduction):
        del calls[0]
    if not calls:
        raise ValueError(
            "compute_loss calls other loss functions when it is run a second time, or over other classes (as "
            "where samples are compared with each other): set trim_backward='sparse'."
        )
    scored = calls.pop(0)
    if scored.kept is None:  # the loss does not depend on it
        call.kept = Kept(torch.zeros(0, dtype=torch.long), torch.zeros(()))
        call.is_unknown = True
        return
    elements = scored.kept.elements
    if call.losses.numel() != scored.losses.numel():  # the model has run the kept samples alone
        if call.reduction == "none":
            raise ValueError("mark_losses in a model's forward pass cannot go with trim_backward='replay'.")
        count = call.losses.numel() if elements.numel() else 0
        elements, call.full = torch.arange(count, device=elements.device), scored.full
    call.kept = Kept(elements, scored.kept.factor)
