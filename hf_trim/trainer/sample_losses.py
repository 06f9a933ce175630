"""
Between steps 3 and 5 of: batch → per-item losses → keep decision → trimmed backward → logs.

What a mini-batch has shown of each of its samples, for the memory of losses (`memory.py`). For example, B = 2 texts
with the token losses `[[4, 2], [1, 3]]`, of which the 4 and the 3 were kept: the losses `[3, 2]` of the samples, and
shares `[0.5, 0.5]` that were kept. It stays on the device.
"""

import torch
from torch import Tensor

from hf_trim.trainer.late_checks import LateChecks
from hf_trim.trainer.losses import IGNORE_INDEX, LossCall
from hf_trim.trainer.ranking import check_samples


UNKNOWN = (
    "trim_memory and trim_scope='dataset' need each sample's loss, and this mini-batch has {{count}} losses for "
    "{size} samples: give labels of the shape [B, T] as 'labels', let the loss have one value per sample "
    "(hf_trim.mark_losses of losses [B]), or train without these."
)


class SampleLosses:
    """
    Collects what the calls of loss functions in a mini-batch show of its samples.

    Args:
        batch_size (`int`): Number B of samples.
        labels (`torch.Tensor`, *optional*): `[B, ...]` labels, to verify which losses belong to which sample.
        checks ([`~hf_trim.trainer.late_checks.LateChecks`]): Raises errors, as soon as the host need not wait for it.
    """

    def __init__(self, batch_size: int, labels: Tensor | None, checks: LateChecks):
        self.batch_size, self.labels, self.checks = batch_size, labels, checks
        self._losses: list[Tensor] = []  # of each call `[3, B]`: weighted loss, weight, whether all are finite
        self._kept: list[Tensor] = []  # of each group of items `[2, B]`: how many were kept, of how many
        self._predictions: list[Tensor | None] = []  # of each call `[3, B]`, if it is over classes
        self._is_left_out = False

    def add(self, track: list[tuple[LossCall, Tensor]], chosen: Tensor) -> None:
        """
        Add calls over the same items.

        Args:
            track (`list`): The calls, and the weight of each in the loss.
            chosen (`torch.Tensor`): `[n]`, which of the items are kept: samples or tokens.

        Raises:
            `ValueError`: If it is not known which losses belong to which sample.
        """
        for call, weight in track:
            self._check(call)
            valid = call.labelled & call.finite
            counts = call.counts.where(valid, 0)
            total, has_label = counts.sum(1), valid.any(1)
            # A class weight is no part of a sample's loss: [B, T] losses are divided by what they count for.
            losses = call.losses.detach().where(valid, 0).sum(1) / total.where(total != 0, 1)
            parts = [weight * losses, weight.abs().expand_as(losses), (call.finite | ~call.labelled).all(1).to(losses)]
            self._losses.append(torch.stack([*(x.where(has_label, 0) for x in parts[:2]), parts[2]]))
            predict = call.predict if call.losses.shape[1] == 1 else None
            self._predictions.append(None if predict is None else torch.stack(predict()).to(losses))
        valid = track[0][0].labelled
        valid = valid.any(1, keepdim=True) if len(chosen) == self.batch_size else valid
        kept = (chosen.reshape(valid.shape) & valid).sum(1)
        self._kept.append(torch.stack([kept, valid.sum(1)]).to(track[0][0].losses))

    def _check(self, call: LossCall) -> None:
        rows, length = call.losses.shape
        message = UNKNOWN.format(size=self.batch_size)
        labels, target = self.labels, call.target
        is_per_token = labels is not None and labels.dim() > 1 and not labels.is_floating_point()
        if rows != self.batch_size or length > 1 and not is_per_token:
            raise ValueError(message.format(count=call.losses.numel()))
        if labels is None or not is_per_token:
            return
        if length > 1:
            check_samples(call, labels, self.batch_size, self.checks, message)
        elif target is not None and not target.is_floating_point():
            # B losses may be those of B tokens with a label, which the model has taken out of all.
            labelled = labels.to(call.losses.device).ne(IGNORE_INDEX)
            for tokens in (labelled, labelled[..., 1:]):
                of_samples = tokens.flatten(1).sum(1)
                is_wrong = (of_samples.sum() == self.batch_size) & (of_samples != 1).any()
                self.checks.refuse(is_wrong.long() * self.batch_size, message)

    def leave_out(self) -> None:
        """Nothing of the mini-batch is kept: others of the optimizer step are (`step_choice.py`)."""
        self._is_left_out = True

    def values(self) -> Tensor | None:
        """
        Returns:
            `torch.Tensor` or `None`: `[5, B]`: the loss, the share that was kept, the probability of the label, the
                predicted class and the label; NaN where there is none. `None` without a call.
        """
        if not self._losses:
            return None
        weighted, weight, is_finite = torch.stack(self._losses).unbind(1)
        total = weight.sum(0)
        loss = weighted.sum(0) / total
        loss = loss.where((total > 0) & (is_finite.sum(0) == len(is_finite)), torch.nan)
        num_kept, number = torch.stack(self._kept).sum(0)
        kept = torch.zeros_like(loss) if self._is_left_out else num_kept / number.clamp(min=1)
        known = self._predictions[0] if len(self._predictions) == 1 else None
        known = loss.new_full((3, len(loss)), torch.nan) if known is None else known
        return torch.cat([torch.stack([loss, kept]), known]).float()
