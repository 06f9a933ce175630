"""
Step 2 (per-item losses) of: batch → per-item losses → keep decision → trimmed backward → logs.

What a classifier predicts for the samples of a mini-batch. For example, logits `[1, 3]` with the probabilities 0.2,
0.7 and 0.1, and the target 0: the probability 0.2 of the target, and the predicted class 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_trim.trainer.lm_head import LazyLogits


def predicts(logits: Tensor, target: Tensor) -> Callable[[], tuple[Tensor, Tensor, Tensor]] | None:
    """
    What a classifier predicts, for the memory of losses. It is computed only if that is asked for.

    Args:
        logits (`torch.Tensor`): `[n, C]`.
        target (`torch.Tensor`): `[n]` classes.

    Returns:
        `Callable` or `None`: Returns the probability of each target, the predicted class and the target, `[n]` each;
            `None` for logits or targets of other shapes.
    """
    if logits.dim() != 2 or isinstance(logits, LazyLogits) or target.is_floating_point():
        return None

    def predict() -> tuple[Tensor, Tensor, Tensor]:
        scores = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        chances = scores.softmax(-1).gather(1, target.clamp(0, scores.shape[1] - 1)[:, None])[:, 0]
        return chances, scores.argmax(-1).to(chances), target.to(chances)

    return predict
