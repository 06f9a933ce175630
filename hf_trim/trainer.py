"""`TrimmingTrainer`: batch → unreduced losses → kept items → mean of the kept."""

import logging
import random
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import unwrap_peft_model

from hf_trim.arguments import TrimmingConfig
from hf_trim.backward import take_kept
from hf_trim.backward.choice import choose_backward
from hf_trim.backward.replay import rows_of, scoring
from hf_trim.backward.sparse import fallback_report, reset_fallbacks, strict
from hf_trim.checkpoints import load_converted_weights
from hf_trim.losses import HOW_TO_PASS_A_LOSS, ItemLosses, find_loss, item_losses, per_sample, valid_items
from hf_trim.schedule import keep_fraction, schedule_unit
from hf_trim.selection import num_kept, select_items


logger = logging.getLogger(__name__)
LOGGED = ("trim_fraction", "kept_fraction", "trim_threshold", "full_loss")


class TrimmingTrainer(Trainer):
    """
    [`~transformers.Trainer`] with mini-batch trimming (arXiv 2110.13058): of each mini-batch only the fraction p with
    the highest loss counts, and p falls linearly during training. Evaluation and prediction are never trimmed. With
    `trim_start=trim_end=1` or `trim_select="none"` it is the plain `Trainer`.

    With each training log come `trim_fraction` (p), `kept_fraction` (the fraction really kept), `trim_threshold` (the
    lowest loss kept) and `full_loss` (mean loss of the whole mini-batch, comparable with a plain run's `loss`), all
    averaged over the mini-batches since the last log; `loss` is the trimmed one.

    The gradient of accumulated mini-batches is that of the mean over all the items they keep, whatever their sizes.
    (Plain `Trainer` forgets to divide by the number of mini-batches for heads that take `num_items_in_batch` and
    ignore it, such as `BertForSequenceClassification`.)

    Args:
        args ([`TrimmingArguments`] or [`~transformers.TrainingArguments`], *optional*):
            Training arguments; without `trim_*` fields the defaults of [`TrimmingArguments`] hold.
        compute_loss_func (`Callable`, *optional*):
            `f(outputs, labels, num_items_in_batch=None)`, an *unreduced* loss: one value per sample `[B]`, or one per
            label in the labels' shape, in which labels of −100 are no items. Needed for heads other than those of
            classification and regression, and for losses of your own (class weights, focal loss). Evaluation
            reports its mean.
        kwargs: All other arguments of [`~transformers.Trainer`].

    Raises:
        `ValueError`: If the model's head is not supported, or the way of training is not.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.trim = self.args if isinstance(self.args, TrimmingConfig) else TrimmingConfig()
        self._refuse_unsupported()
        # Whether the loss is ours: then it is already the mean over all kept items of an optimizer step.
        self._own_loss = self.trim.trims or self.compute_loss_func is not None
        self.loss_is_scaled_for_ga = True if self._own_loss else None
        self._labels_to_come: list[Tensor] = []
        self._optimizer_step_kept: Tensor | int = 0
        self._checked_loss = False
        self._told = set()
        reset_fallbacks()
        self._logged_sums = torch.zeros(len(LOGGED) + 1, dtype=torch.float64)

    def _refuse_unsupported(self):
        if self.args.n_gpu > 1:
            raise ValueError(
                f"torch.nn.DataParallel over {self.args.n_gpu} GPUs would trim each replica and average "
                "wrongly. Start one process per GPU (`accelerate launch` or `torchrun`), or set "
                "CUDA_VISIBLE_DEVICES to one GPU."
            )
        if self.get_cp_size() > 1 or self.get_sp_size() > 1:
            raise ValueError(
                "Context or sequence parallelism splits a sample over devices, and its loss cannot be ranked there: "
                "set cp_size and sp_size to 1."
            )
        if self.compute_loss_func is None:
            self._find_loss()
            if self.trim.trim_unit == "token":
                raise ValueError(
                    "trim_unit='token' needs a loss per token, and this head has one per sample: use trim_unit='auto' "
                    f"or 'sample'. {HOW_TO_PASS_A_LOSS}"
                )

    def _find_loss(self):
        if self.compute_loss_func is not None:
            return self.compute_loss_func
        model = unwrap_peft_model(self.accelerator.unwrap_model(self.model))
        return find_loss(model, self.args.label_smoothing_factor)

    def _item_losses(self, outputs: Any, labels: Tensor) -> ItemLosses:
        items = item_losses(self._find_loss(), outputs, labels)
        return per_sample(items) if self.trim.trim_unit == "sample" else items

    @property
    def trim_fraction(self) -> float:
        """The fraction p of the next mini-batch that is kept."""
        if not self.trim.trims:
            return 1.0
        args, state = self.args, self.state
        return keep_fraction(
            self.trim.trim_start,
            self.trim.trim_end,
            schedule_unit(self.trim.trim_schedule, args.num_train_epochs, args.max_steps),
            epoch=state.epoch or 0.0,
            num_epochs=args.num_train_epochs,
            step=state.global_step,
            num_steps=state.max_steps,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:
            load_converted_weights(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            load_converted_weights(self.model, self.state.best_model_checkpoint)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        # Labels of the mini-batches of the next optimizer step: they tell how many items it will keep.
        self._labels_to_come = [batch["labels"] for batch in batch_samples if "labels" in batch]
        self._optimizer_step_kept = 0
        return batch_samples, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        The trimmed loss while training, the whole batch's otherwise.

        Args:
            model (`torch.nn.Module`): The model, possibly wrapped.
            inputs (`dict[str, torch.Tensor]`): The batch, with `labels`.
            return_outputs (`bool`, *optional*, defaults to `False`): Whether to return the outputs as well.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): Number of labels in the optimizer step.

        Returns:
            `torch.Tensor` or `tuple`: The scalar loss, or loss and outputs.
        """
        labels = inputs.get("labels")
        if labels is None:
            raise ValueError(
                f"The batch has no 'labels', only {sorted(inputs)}: TrimmingTrainer ranks samples by their loss. Name "
                "the label column 'labels', or let the data collator do so."
            )
        trimmed = model.training and self.trim.trims
        if not trimmed and self.compute_loss_func is None:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if model.training:
                with torch.no_grad():
                    items = self._item_losses(outputs, labels)
                self._record(1.0, items, select_items(items.losses, 1.0, valid=items.valid))
            return (loss, outputs) if return_outputs else loss

        if self.compute_loss_func is not None or self.label_smoother is not None:
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if not model.training:
            outputs = model(**inputs)
            items = self._item_losses(outputs, labels)
            loss = items.losses[items.valid].mean()
            return (loss, outputs) if return_outputs else loss

        keep = self.trim_fraction
        backward = self._backward_mode(model, labels, keep)
        with scoring(model) if backward == "replay" else nullcontext():
            outputs = model(**inputs)
            items = self._item_losses(outputs, labels)
        self._check_loss(outputs, items)
        kept = select_items(
            items.losses, keep, valid=items.valid, select=self.trim.trim_select, generator=self._generator()
        )
        self._record(keep, items, kept)
        total = self._kept_in_optimizer_step(keep, items, labels)
        if self._labels_to_come:
            self._labels_to_come.pop()
        if backward == "replay":
            # Without a valid item the first sample stands in, so that there is a graph (its loss does not count).
            rows = kept if kept.numel() else kept.new_zeros(1)
            outputs = model(**rows_of(inputs, rows, len(labels)))
            losses = self._item_losses(outputs, labels[rows]).losses
        else:
            losses = take_kept(items.losses, kept, backward) if kept.numel() else items.losses
        loss = losses.sum() / total if kept.numel() else losses.sum() * 0
        if self.args.average_tokens_across_devices:
            # Gradients are averaged over the processes, while the total counts the items of all of them.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args, **kwargs):
        with strict(self.trim.trim_strict):
            return super().training_step(*args, **kwargs)

    def _backward_mode(self, model: nn.Module, labels: Tensor, keep: float) -> str:
        if keep == 1:
            return "dense"  # nothing is left out: each way is the plain one
        per_sample = labels.dim() == 1 or self.trim.trim_unit == "sample" or self.compute_loss_func is None
        mode, reason = choose_backward(self.trim.trim_backward, model, per_sample, keep)
        if (mode, reason) not in self._told and reason != "asked for":
            logger.warning("Backward pass of the trimmed batches: %s (%s).", mode, reason)
        self._told.add((mode, reason))
        return mode

    def _kept_in_optimizer_step(self, keep: float, items: ItemLosses, labels: Tensor) -> Tensor | int:
        """Number of items that all mini-batches of this optimizer step keep, on all devices where those are summed."""
        if not self._optimizer_step_kept or not self._labels_to_come:
            # Outside of `train()` (a `training_step` of its own) the mini-batch stands alone.
            all_labels = self._labels_to_come or [labels]
            per_label = items.losses.dim() > 1
            valid = [valid_items(each, each.shape if per_label else each.shape[:1]) for each in all_labels]
            total = sum(num_kept(keep, int(each.sum())) for each in valid)
            if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
                total = int(self.accelerator.gather(torch.tensor([total], device=self.args.device)).sum())
            self._optimizer_step_kept = max(total, 1)
        return self._optimizer_step_kept

    def _generator(self) -> torch.Generator | None:
        """A random choice that is a function of the state alone, so that a resumed training repeats it."""
        if self.trim.trim_select != "random":
            return None
        place = (self.args.seed, self.state.global_step, len(self._labels_to_come), self.args.process_index)
        return torch.Generator().manual_seed(random.Random(str(place)).getrandbits(63))

    def _check_loss(self, outputs: Any, items: ItemLosses) -> None:
        """Once: the mean of our losses must be the model's own loss, else its head is not what its name says."""
        if self._checked_loss:
            return
        self._checked_loss = True
        model_loss = outputs.get("loss") if isinstance(outputs, dict) else None
        if self.compute_loss_func is not None or model_loss is None or not items.valid.any():
            return
        ours, theirs = items.losses[items.valid].mean().item(), model_loss.mean().item()
        if abs(ours - theirs) > 1e-3 + 0.01 * abs(theirs):
            raise ValueError(
                f"{type(self.model).__name__} returned the loss {theirs:.6g} for the first batch, and the mean of the "
                f"losses that TrimmingTrainer computes for such a head is {ours:.6g}. {HOW_TO_PASS_A_LOSS}"
            )

    def _record(self, keep: float, items: ItemLosses, kept: Tensor) -> None:
        if kept.numel() == 0:
            return
        losses = items.losses.detach().flatten()
        valid = losses[items.valid.flatten()]
        threshold, full_loss = losses[kept].min().item(), valid.mean().item()
        values = [keep, kept.numel() / valid.numel(), threshold, full_loss, 1.0]
        self._logged_sums += torch.tensor(values, dtype=torch.float64)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        Add what was trimmed since the last log to the training logs.

        Args:
            logs (`dict[str, float]`): The values to log.
            start_time (`float`, *optional*): The start of training.
        """
        if "loss" in logs:
            if (fallbacks := fallback_report()) and "fallbacks" not in self._told:
                counts = ", ".join(f"{name} {count}×" for name, count in fallbacks.items())
                self._told.add("fallbacks")
                logger.warning("Operations without a row-sparse rule ran dense: %s. Gradients are the same.", counts)
            sums = self.accelerator.reduce(self._logged_sums.float().to(self.args.device)).tolist()
            if sums[-1] > 0:
                logs.update({name: value / sums[-1] for name, value in zip(LOGGED, sums[:-1], strict=True)})
            self._logged_sums.zero_()
        super().log(logs, start_time)
