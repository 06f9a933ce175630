"""
The whole way: batch → per-item losses → keep decision → trimmed backward → logs.

Where to find each step, e.g. of B = 8 samples of which p = 0.25 are kept:

1. batch: `Trainer` gives it to `compute_loss`, its own or that of a subclass, around which stands
   `_compute_trimmed_loss` (`trimmed_loss.py`).
2. per-item losses `[8]`: caught where torch's loss functions are called (`losses.py`).
3. keep decision `[2]`: p comes from [`TrimmingMixin.keep_fraction`] (`schedule.py`); what is kept of each loss is
   decided at the end of `compute_loss` (`batch.py`, `ranking.py`, `selection.py`).
4. trimmed backward: the way is chosen in `_choose_backward` (`hf_trim/backward`).
5. logs: [`TrimmingMixin.log`] (`logs.py`).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_trim.backward._torch_internals import around
from hf_trim.backward.settings import checked, fallback_report, reset_fallbacks, strict, taped
from hf_trim.hub.push import PushMixin
from hf_trim.trainer.arguments import TrimmingConfig
from hf_trim.trainer.batch import TrimmedBatch
from hf_trim.trainer.checkpoints import load_converted_weights
from hf_trim.trainer.checks import check_liger_kernel, check_settings
from hf_trim.trainer.kept_state import NAMES
from hf_trim.trainer.loss_functions import SmoothedLoss, UserLoss
from hf_trim.trainer.loss_pass import REFERENCE_COLUMN
from hf_trim.trainer.losses import NO_PART
from hf_trim.trainer.process_group import host_numbers
from hf_trim.trainer.remembering import MOST_STEPS
from hf_trim.trainer.timing import is_timed
from hf_trim.trainer.trimmed_loss import TrimmedLossMixin


class TrimmingMixin(TrimmedLossMixin, PushMixin):
    """
    Mini-batch trimming for any subclass of [`~transformers.Trainer`]. Name it before that class:

    ```python
    class TrimmingSeq2SeqTrainer(TrimmingMixin, Seq2SeqTrainer):
        pass
    ```

    It takes the trainer's arguments, and one more. To set the `trim_*` fields, let the training arguments inherit from
    [`~hf_trim.trainer.arguments.TrimmingConfig`] as well: `@dataclass class Args(TrimmingConfig,
    Seq2SeqTrainingArguments)`. What is trimmed are the means that torch's loss functions take while the trainer's
    `compute_loss` runs ([`TrimmingTrainer`]).

    Args:
        args: Arguments of the trainer.
        trim_score (`Callable`, *optional*): What items are ranked by, if not by their losses ([`TrimmingTrainer`]).
        kwargs: Arguments of the trainer.

    Raises:
        `ValueError`: If the way of training is not supported.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, TrainingArguments):
                check_liger_kernel(value, TrimmingConfig.of(value))
        super().__init__(*args, **kwargs)
        self._checked_settings: tuple = ()
        self._current_settings()
        if self.compute_loss_func is not None:
            self.compute_loss_func = UserLoss(self, self.compute_loss_func)
        if self.label_smoother is not None:
            self.label_smoother = cast(Any, SmoothedLoss(self, self.label_smoother))  # it is called in the same way
        self._stand_around()
        self._difference: Tensor | float = 0.0  # of the trimmed loss from that of all items, in this training step
        self._is_loss_known = False  # whether what the loss is made of was looked at
        self._training_inputs: Any = None  # of the training step under way
        self._is_saving = False  # whether a checkpoint is being written
        reset_fallbacks()

    def _stand_around(self) -> None:
        """Subclasses and users may give methods that do not call `super()`, so ours stand around them."""
        for name, ours in (
            ("training_step", self._run_training_step),
            ("compute_loss", self._compute_trimmed_loss),
            ("get_batch_samples", self._collect_batch_samples),
            ("get_train_dataloader", self._load_with_indices),
        ):
            method = getattr(self, name)
            if not (isinstance(method, partial) and method.func == ours):
                setattr(self, name, partial(ours, method))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as [`~transformers.Trainer`] does, with the arguments of its method."""
        self._stand_around()  # methods may have been replaced since the trainer was made
        return super().train(*args, **kwargs)

    def _current_settings(self) -> TrimmingConfig:
        """The same, checked if they have changed."""
        trim = self.trim
        settings = trim.values()
        if settings != self._checked_settings:
            check_settings(self.args, trim, max(self.get_cp_size(), self.get_sp_size()), cast(nn.Module, self.model))
            if self._score is not None and trim.trim_select == "random" and not trim.is_adaptive:
                raise ValueError("trim_score has no effect with trim_select='random': leave one of them out.")
            self._checked_settings = settings
        return trim

    # ---- the trainer's state --------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:
            load_converted_weights(cast(nn.Module, self.model if model is None else model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            assert self.model is not None and self.state.best_model_checkpoint is not None  # it was just loaded
            load_converted_weights(self.model, self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._checks.read()  # nothing is saved of a training that is broken
        super().save_model(output_dir, _internal_call)
        if self._is_saving and self._memory is not None and self.args.should_save:
            self._memory.save(cast(str, output_dir))  # before the trainer's state, which marks a whole checkpoint
            if self._scope is not None:
                self._scope.save(cast(str, output_dir))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._masses.save(self.state)
        self._timing.save(self.state)
        self._read_losses()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving = False

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._memory is not None and checkpoint is not None:
            if self._scope is not None:
                self._scope.load(checkpoint)  # first: it says what is missing in its own words
            self._memory.load(checkpoint)

    def _load_callback_state(self) -> None:
        # What is kept there for the next steps belongs to no callback, and would be reported as ignored.
        callbacks = cast(dict[str, Any], self.state.stateful_callbacks)
        own = {name: callbacks.pop(name) for name in NAMES if name in callbacks}
        super()._load_callback_state()
        callbacks.update(own)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._score is not None and REFERENCE_COLUMN not in cast(list, self._signature_columns):
            cast(list, self._signature_columns).append(REFERENCE_COLUMN)  # a column that is not removed

    # ---- a training step ------------------------------------------------------------------------------------------

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        super()._run_epoch(*args, **kwargs)
        self._read_losses()

    def _collect_batch_samples(
        self, get_batch_samples: Callable[..., tuple[list, Any]], epoch_iterator: Iterator, *args: Any, **kwargs: Any
    ) -> tuple[list, Any]:
        """Stands around `get_batch_samples`: notes the mini-batches of the step, and which samples they have."""
        self._stand_around()
        if self.state.global_step >= self._read_step + MOST_STEPS:
            self._read_losses()
        batches = self._without_indices(epoch_iterator)
        self._step_inputs, num_items_in_batch = get_batch_samples(batches, *args, **kwargs)
        self._number, self._scored = -1, {}
        self._num_batches = len(self._step_inputs)
        if self._process_group(self.trim, self.keep_fraction) is not None:
            self._num_batches = max(host_numbers(self._num_batches, self.accelerator))
        return self._step_inputs, num_items_in_batch

    def _run_training_step(self, training_step: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Stands around `training_step`: the trimmed loss in the place of that of all items."""
        trim = self._current_settings()
        remembers = trim.remembers and self._memory is not None
        if not (trim.trims or remembers) or self._batches is not None:
            return training_step(*args, **kwargs)
        self._number += 1
        self._batches, self._difference, self._has_loss, self._is_remembered = [], 0.0, False, False
        has_scaler = self.accelerator.scaler is not None or self.accelerator.mixed_precision == "fp16"
        self._checks.begin_batch(
            self.state.global_step + 1, self._per_sample is None, has_scaler and trim.trim_nonfinite == "error"
        )
        self._training_inputs = (*args, *kwargs.values())
        try:
            with strict(trim.trim_strict), checked(trim.trim_check), taped():
                with around(self.accelerator, "backward", self._watch_backward):
                    loss = training_step(*args, **kwargs)
            if not self._has_loss:
                raise ValueError(
                    f"The training_step of {type(self).__name__} does not call self.compute_loss, which is where the "
                    "loss is trimmed: let it do so, or set trim_select='none' and trim_memory=False."
                )
            if self._batches and not any(call.used for batch in self._batches for call in batch.calls):
                if not any(batch.has_no_graph for batch in self._batches):
                    raise ValueError(NO_PART)
            self._end_training_step(trim, self._batches)
            self._trimming_logs.add_loss(loss, self.state.global_step)
            return (loss + self._difference).to(loss.dtype)
        finally:
            self._batches = self._training_inputs = None

    def _end_training_step(self, trim: TrimmingConfig, batches: list[TrimmedBatch]) -> None:
        """Note in the trainer's state what later steps depend on."""
        if not trim.trims:
            return
        if trim.is_adaptive:
            for batch in batches:
                self._masses.add(batch)
        if self._number + 1 < len(self._step_inputs):
            return  # the optimizer step is not complete
        kept = None
        if trim.is_adaptive:
            self._masses.end_step(self.state, self.accelerator)
        if is_timed(self.args, trim):
            if trim.is_adaptive:
                fractions = [batch.logged[0] / batch.logged[1] for batch in batches if batch.logged is not None]
                kept = torch.stack(fractions).nanmean().nan_to_num(1.0) if fractions else torch.ones(())
            self._timing.end_step(self.state, self.accelerator, self.keep_fraction, kept)

    def _watch_backward(self, backward: Callable, loss: Tensor, **kwargs: Any) -> None:
        """Stands around `accelerator.backward`: finds by how much the trimmed loss differs from that of all items."""
        scales: list[Tensor] = []  # a factor of the accelerator's for half precision
        calls = [call for batch in self._batches or () for call in batch.calls]
        for call in calls:
            call.weighted = call.difference = 0.0
        if loss.requires_grad:
            loss.register_hook(lambda scale: scales.append(scale.detach()))
        with self._timing.measure(self._training_inputs, self.args.device):
            backward(loss, **kwargs)
        for scale in scales[:1]:
            self._difference = self._difference + sum(call.difference for call in calls) / scale
            if calls and not self._is_loss_known and self.trim.trims:  # in the first mini-batch
                self._is_loss_known, whole = True, float(loss.detach())
                self._notices.tell_rest(whole, whole - float(sum(call.weighted for call in calls) / scale))

    # ---- logs -----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        Add what was trimmed since the last log to the training logs.

        Args:
            logs (`dict[str, float]`): The values to log.
            start_time (`float`, *optional*): The start of training.
        """
        self._checks.read()
        if "loss" in logs and self.is_in_train:
            self._read_losses()
        if "loss" in logs and not self.trim.trims:
            logs.update(self._dataset_fractions())
            if self._scope is None:
                logs["full_loss"] = logs["loss"]
        elif "loss" in logs:
            self._notices.tell_fallbacks(fallback_report())
            logs.update(self._trimming_logs.take(self.accelerator, self.args.device, self.state.global_step))
        super().log(logs, start_time)
        if self.trim.trims and self.is_in_train:
            self._notices.tell_harm(self.state, self.args, self.trim)


class TrimmingTrainer(TrimmingMixin, Trainer):
    """
    [`~transformers.Trainer`] with mini-batch trimming (arXiv 2110.13058): of each mini-batch only the fraction p with
    the highest loss counts, and p falls linearly during training. Evaluation and prediction are never trimmed. With
    `trim_keep_start=trim_keep_end=1` or `trim_select="none"` it is the plain `Trainer`.

    It takes any model that `Trainer` takes, and a subclass may have a `compute_loss` of its own. What is trimmed are
    the means and sums that torch's loss functions take while `compute_loss` runs, in the model's forward pass or
    outside of it: the mean over the kept items comes in the place of the mean over all. An item is what the loss is
    over: a sample for classification, regression (the mean over its outputs), question answering and CTC; a token (or
    pixel) for language modelling, token classification and semantic segmentation. With `trim_unit="sample"` tokens are
    trimmed by samples: these are ranked by the mean over their tokens, and all tokens of a kept sample count. Labels
    of −100 (or what else the loss ignores) are no items. Losses by hand are marked with
    [`~hf_trim.trainer.losses.mark_losses`]. A model whose loss cannot be trimmed is refused in its first mini-batch.

    A mini-batch counts for what it counts in the plain `Trainer`, with gradient accumulation and in several processes,
    too. `compute_loss` returns the loss of the whole mini-batch; in the training's backward pass its gradient is that
    of the trimmed loss. (A function of several means, such as one with learned weights, gets their values over the
    whole mini-batch. A backward pass of its own inside of `compute_loss` is not trimmed.)

    Each training log has: `keep_fraction` (p, the fraction that was asked for), `kept_fraction` (the fraction that was
    really kept, which differs from p by rounding) and `full_loss` (what the plain `Trainer` would log as `loss`); and
    where something was left out, `trim_threshold` (the lowest loss that was kept) and `kept_mass` (the share of the
    gradient mass that was kept). `loss` is the trimmed one. If `full_loss` rises while p falls, or an evaluation is
    well below the best one, a warning says what to change. With `trim_schedule="adaptive"` the kept losses are divided
    by the number of all items, so that `loss` is below `full_loss`. With `trim_scope="dataset"` there is no
    `full_loss`: the rest of the data set is not looked at.

    Args:
        args ([`TrimmingArguments`] or [`~transformers.TrainingArguments`], *optional*):
            Training arguments; without `trim_*` fields the defaults of [`TrimmingArguments`] hold. Fields that are
            changed later count from the next training step.
        compute_loss_func (`Callable`, *optional*):
            `f(outputs, labels, num_items_in_batch=None)`. As for the plain `Trainer`, it may return a scalar that
            torch's loss functions have computed. It may also return *unreduced* losses: one per sample `[B]`, or one
            per label, of which those of −100 are no items; or a tuple of losses of any shape and of what each counts
            for in the mean, a weight, or 0 for no item. The training loss then is the sum of the losses, divided by
            the sum of the counts, for the mini-batch's share of the labels of the step. Evaluation reports the mean.
        trim_score (`Callable`, *optional*):
            `f(outputs, inputs, losses)`, what items are ranked by in place of their losses. It gets the model's
            outputs, the mini-batch, and its losses `[B]` (`[B, T]` if there is one for each token), and returns scores
            of the same shape; higher ones are kept. A column `reference_loss` of the data set is in `inputs`, but not
            given to the model: `losses - inputs["reference_loss"]` is the excess over a reference model. (Columns of
            other names that the model does not take need `remove_unused_columns=False`, and a `compute_loss` that
            does not give them to it.) With `trim_schedule="adaptive"` scores above 0 are the mass; if there are none,
            the item with the highest is kept.
        kwargs: All other arguments of [`~transformers.Trainer`].

    Raises:
        `ValueError`: If the way of training is not supported; in the first mini-batch, if the loss cannot be trimmed.
    """
