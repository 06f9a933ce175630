"""
Step 3 (keep decision) of: batch → per-item losses → keep decision → trimmed backward → logs.

With one sample a mini-batch there is nothing to choose from in it. A replay scores all mini-batches of the optimizer
step first, and then runs the kept ones. For example, 8 accumulated mini-batches of one sample and p = 0.25: 8 forward
passes without a graph, then forward and backward passes of the 2 mini-batches with the highest losses.
"""

import torch
from torch import Tensor

from hf_trim.trainer.batch import TrimmedBatch
from hf_trim.trainer.loss_pass import LossPass


def choose_in_step(passes: list[LossPass]) -> None:
    """
    Choose among the mini-batches of an optimizer step, which have one sample each. The kept ones together count for
    what all of them would.

    Args:
        passes (`list` of [`~hf_trim.trainer.loss_pass.LossPass`]): The mini-batches, scored by the first pass of a
            replay.
    """
    batches = [loss_pass.batch for loss_pass in passes]
    first = batches[0]
    # Without a label there is no score, and nothing to keep.
    scores = torch.stack(
        [torch.tensor(-torch.inf) if x.logged is None else x.logged[2].float().cpu() for x in batches]
    )
    mass = torch.stack([torch.zeros(()) if x.logged is None else x.logged[4].float().cpu() for x in batches])
    is_kept, rest, _ = first.choose(scores, mass, scores > -torch.inf, len(scores))
    counts = torch.stack([_count(batch) for batch in batches])
    part = counts[rest if first.counts_all else is_kept]
    ratio = counts.sum() / part.sum() if is_kept.any() else torch.zeros(())
    for loss_pass, kept in zip(passes, is_kept.tolist(), strict=True):
        batch, loss_pass.is_left_out = loss_pass.batch, not kept
        batch.most_items = len(batches)
        if batch.seen is not None and not kept:
            batch.seen.leave_out()
        for call in batch.scored or ():
            if call.kept is not None:
                call.kept = call.kept._replace(factor=call.kept.factor * ratio.to(call.kept.factor))
        if batch.logged is not None:
            num_kept, num_valid = batch.logged[:2]
            shared = torch.stack([scores[is_kept].min(), mass[is_kept].sum(), mass.sum()]).to(num_kept)
            batch.logged = torch.cat([torch.stack([num_kept * float(kept), num_valid]), shared])


def _count(batch: TrimmedBatch) -> Tensor:
    """What a mini-batch counts for in its step: 1 if its loss is a mean, or else the number of its tokens."""
    call = next((call for call in batch.scored or () if call.kept is not None), None)
    return torch.ones(()) if call is None or call.reduction == "mean" else call.counts.sum().cpu()
