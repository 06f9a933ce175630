"""
The whole way: batch → per-item losses → keep decision → trimmed backward → logs.

Where to find each step, e.g. of B = 8 samples of which p = 0.25 are kept:

1. batch: `Trainer` gives it to `compute_loss`, its own or that of a subclass, around which stands
   [`TrimmingMixin._compute_trimmed_loss`].
2. per-item losses `[8]`: caught where torch's loss functions are called (`losses.py`).
3. keep decision `[2]`: p comes from [`TrimmingMixin.keep_fraction`] (`schedule.py`); what is kept of each loss is
   decided at the end of `compute_loss` (`batch.py`, `selection.py`).
4. trimmed backward: the way is chosen in [`TrimmingMixin._choose_backward`] (`hf_trim/backward`).
5. logs: [`TrimmingMixin.log`] (`logs.py`).
"""

import copy
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_trim._compat import find_batch_size, unwrap_peft_model
from hf_trim.backward._torch_internals import around, compiled_modules, without_compilation
from hf_trim.backward.choice import choose_backward
from hf_trim.backward.compiled.backend import CUDA_GRAPHS, mark_batch_dynamic, uses_cuda_graphs
from hf_trim.backward.settings import checked, fallback_report, refused_graphs, reset_fallbacks, strict
from hf_trim.hub.push import PushMixin
from hf_trim.trainer.arguments import TrimmingConfig
from hf_trim.trainer.batch import TrimmedBatch
from hf_trim.trainer.checkpoints import load_converted_weights
from hf_trim.trainer.checks import check_liger_kernel, check_settings
from hf_trim.trainer.kept_state import NAMES
from hf_trim.trainer.lm_head import LMHead, find_lm_head
from hf_trim.trainer.logs import TrimmingLogs
from hf_trim.trainer.loss_functions import SmoothedLoss, UserLoss
from hf_trim.trainer.loss_pass import REFERENCE_COLUMN, LossPass, is_compiled_whole, without_reference
from hf_trim.trainer.losses import MARK_LOSSES, NO_PART, loss_of
from hf_trim.trainer.mass_history import MassHistory
from hf_trim.trainer.notices import Notices
from hf_trim.trainer.process_group import ProcessGroup
from hf_trim.trainer.schedule import keep_fraction, schedule_unit
from hf_trim.trainer.step_choice import choose_in_step
from hf_trim.trainer.timing import BackwardTiming, is_timed


class TrimmingMixin(PushMixin):
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

    def __init__(
        self, *args: Any, trim_score: Callable[[Any, Any, Tensor], Tensor] | None = None, **kwargs: Any
    ) -> None:
        if trim_score is not None and not callable(trim_score):
            raise ValueError(
                "trim_score must be a function f(outputs, inputs, losses) that returns scores, and is "
                f"{trim_score!r}. Leave it out to rank items by their losses."
            )
        self._score = trim_score
        for value in (*args, *kwargs.values()):
            if isinstance(value, TrainingArguments):
                check_liger_kernel(value, TrimmingConfig.of(value))
        self._inner_cache: tuple[Any, Any] = None, None  # the model, with and without wrappers
        super().__init__(*args, **kwargs)
        self._checked_settings: tuple = ()
        self._current_settings()
        if self.compute_loss_func is not None:
            self.compute_loss_func = UserLoss(self, self.compute_loss_func)
        if self.label_smoother is not None:
            self.label_smoother = cast(Any, SmoothedLoss(self, self.label_smoother))  # it is called in the same way
        self._stand_around()
        self._step_inputs: list = []  # the mini-batches of the optimizer step
        self._scored: dict[int, LossPass] = {}  # those that are scored before their turn, by their number
        self._batch: TrimmedBatch | None = None  # the mini-batch whose loss is being computed
        self._batches: list[TrimmedBatch] | None = None  # those of the training step under way
        self._difference: Tensor | float = 0.0  # of the trimmed loss from that of all items, in this training step
        self._number = -1  # which of the step's mini-batches it is
        self._num_batches = 1  # of the step, at most, over the processes that choose together
        self._per_sample: bool | None = None  # whether items are samples, as the last mini-batch showed
        self._has_loss = False  # whether `compute_loss` was called in it
        self._is_loss_known = False  # whether what the loss is made of was looked at
        self._is_replay_known = False  # whether the second pass of a replay was compared with the first
        self._masses = MassHistory()
        self._timing = BackwardTiming()
        self._training_inputs: Any = None  # of the training step under way
        self._notices = Notices()
        self._trimming_logs = TrimmingLogs()
        reset_fallbacks()

    def _stand_around(self) -> None:
        """Subclasses and users may give methods that do not call `super()`, so ours stand around them."""
        for name, ours in (("training_step", self._run_training_step), ("compute_loss", self._compute_trimmed_loss)):
            method = getattr(self, name)
            if not (isinstance(method, partial) and method.func == ours):
                setattr(self, name, partial(ours, method))

    @property
    def trim(self) -> TrimmingConfig:
        """What is trimmed, and how: the `trim_*` fields of `args` as they are now."""
        return TrimmingConfig.of(self.args)

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

    def _inner_model(self) -> nn.Module:
        """The model without accelerate's, the compiler's and PEFT's wrappers. To find it takes a millisecond."""
        assert self.model is not None
        if self._inner_cache[0] is not self.model:
            inner = unwrap_peft_model(without_compilation(self.accelerator.unwrap_model(self.model)))
            self._inner_cache = (self.model, inner)
        return self._inner_cache[1]

    # ---- the trainer's state --------------------------------------------------------------------------------------

    @property
    def keep_fraction(self) -> float:
        """
        The fraction p of the next mini-batch that shall be kept; how p falls is in `schedule.py`. If it follows the
        losses, it is at most this: the share m of the mass is carried by no more than the same share of the items.
        """
        args, state, trim = self.args, self.state, self.trim
        if not trim.trims:
            return 1.0
        if trim.is_adaptive:
            return trim.trim_mass
        fraction = keep_fraction(
            trim.trim_keep_start,
            trim.trim_keep_end,
            schedule_unit(trim.trim_schedule, args.num_train_epochs, args.max_steps),
            epoch=state.epoch or 0.0,
            num_epochs=args.num_train_epochs,
            step=state.global_step,
            num_steps=state.max_steps,
        )
        return min(fraction, 1 - trim.trim_skip_hardest)

    def _generator(self, trim: TrimmingConfig) -> torch.Generator | None:
        """For a random choice: seeded by the trainer's state alone, so that a resumed training repeats the choice."""
        if trim.trim_select != "random":
            return None
        seed: tuple[int, ...] = (self.args.seed, self.state.global_step)
        if trim.trim_scope == "global":
            # All processes must make the same choice, however many mini-batches each of them has.
            seed = (*seed, self._number)
        else:
            seed = (*seed, len(self._step_inputs) - self._number, self.args.process_index)
        return torch.Generator().manual_seed(random.Random(str(seed)).getrandbits(63))

    def _process_group(self, trim: TrimmingConfig, keep: float) -> ProcessGroup | None:
        processes = self.accelerator.num_processes
        if trim.trim_scope == "local" or keep == 1 or processes == 1:
            return None
        gather = self.accelerator.gather
        return ProcessGroup(
            lambda values: gather(values[None]), self.args.process_index, processes, self.accelerator.device
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:
            load_converted_weights(cast(nn.Module, self.model if model is None else model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            assert self.model is not None and self.state.best_model_checkpoint is not None  # it was just loaded
            load_converted_weights(self.model, self.state.best_model_checkpoint)

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

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        self._stand_around()
        self._step_inputs, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        self._number, self._scored = -1, {}
        self._num_batches = len(self._step_inputs)
        if self._process_group(self.trim, self.keep_fraction) is not None:
            own = torch.tensor([self._num_batches], device=self.accelerator.device)
            self._num_batches = int(self.accelerator.gather(own).max())
        return self._step_inputs, num_items_in_batch

    def _run_training_step(self, training_step: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Stands around `training_step`: the trimmed loss in the place of that of all items."""
        trim = self._current_settings()
        if not trim.trims or self._batches is not None:
            return training_step(*args, **kwargs)
        self._number += 1
        self._batches, self._difference, self._has_loss = [], 0.0, False
        self._training_inputs = (*args, *kwargs.values())
        try:
            with strict(trim.trim_strict), checked(trim.trim_check):
                with around(self.accelerator, "backward", self._watch_backward):
                    loss = training_step(*args, **kwargs)
            if not self._has_loss:
                raise ValueError(
                    f"The training_step of {type(self).__name__} does not call self.compute_loss, which is where the "
                    "loss is trimmed: let it do so, or set trim_select='none'."
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
        if trim.is_adaptive:
            for batch in batches:
                self._masses.add(batch)
        if self._number + 1 < len(self._step_inputs):
            return  # the optimizer step is not complete
        kept = None
        if trim.is_adaptive:
            self._masses.end_step(self.state, self.accelerator)
            fractions = [batch.logged[0] / batch.logged[1] for batch in batches if batch.logged is not None]
            kept = torch.stack(fractions).mean() if fractions else torch.ones(())
        if is_timed(self.args, trim):
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
            if calls and not self._is_loss_known:  # in the first mini-batch
                self._is_loss_known, whole = True, float(loss.detach())
                self._notices.tell_rest(whole, whole - float(sum(call.weighted for call in calls) / scale))

    def _compute_trimmed_loss(
        self, compute_loss: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """
        Stands around `compute_loss`: the same loss, whose gradient is that of the trimmed one while training.

        Raises:
            `ValueError`: If nothing could be trimmed, because no loss function of torch was called.
        """
        trim = self.trim
        is_training = torch.is_grad_enabled() and (self.is_in_train or self._batches is not None)
        model_inputs = inputs if self._score is None else without_reference(inputs)
        if not (trim.trims and is_training) or self._batch is not None:
            return compute_loss(model, model_inputs, *args, **kwargs)
        self._has_loss = True
        keep, inner = self.keep_fraction, self._inner_model()
        head = self._chunked_head(trim, inner, keep)
        is_simple = keep == 1 and self._per_sample is not None  # the first mini-batch has shown what the loss is over
        compiled = [] if is_simple and head is None else compiled_modules(model)
        if head is not None and is_compiled_whole(inner, compiled):
            head = None
        if is_simple and head is None:
            result = compute_loss(model, model_inputs, *args, **kwargs)
            if loss_of(result).isfinite().all():
                self._trimming_logs.add_untrimmed()
                return result
            compiled = compiled_modules(model)  # a loss that is not finite is looked at as any other
        choose = partial(self._choose_backward, trim, model, keep, head is not None, bool(compiled))
        assumed = self._per_sample is not False
        mode = choose(assumed)[0]
        has_outputs = bool(args) or len(kwargs) > 1
        new_pass = partial(self._new_pass, compute_loss, trim, keep, model, compiled, head, mode, has_outputs)
        loss_pass = self._scored.pop(self._number, None) or new_pass(inputs)
        batch = self._batch = loss_pass.batch
        try:
            if mode == "replay" and loss_pass.scored is None:
                loss_pass.score(inputs, *args, **kwargs)
                if batch.most_items == 1 and loss_pass.kept is not None:
                    self._choose_in_step(loss_pass, new_pass, *args, **kwargs)
            counted = {} if loss_pass.scored is None else self._counted()
            result = loss_pass.run(inputs, *args, **kwargs)
            vars(self).update(counted)
            if mode == "replay" and not self._is_replay_known:
                loss_pass.check_replay(result)
                self._is_replay_known = True
        finally:
            self._batch = None
        if not batch.calls:
            raise ValueError(
                f"{type(self).__name__} found nothing to rank: no loss function of torch took a mean or a sum while "
                f"the loss of {type(inner).__name__} was computed. {MARK_LOSSES} trim_select='none' trains without "
                "trimming."
            )
        self._note(trim, batch, choose(assumed if batch.per_sample is None else batch.per_sample))
        if batch.process_group is not None and self._number + 1 == len(self._step_inputs):
            for _ in range(self._num_batches - len(self._step_inputs)):  # others have more of them in this step
                batch.join_without_items()
        return result

    def _new_pass(
        self, compute_loss: Callable[..., Any], trim: TrimmingConfig, keep: float, model: nn.Module,
        compiled: list[nn.Module], head: LMHead | None, mode: str, has_outputs: bool, inputs: Any,
    ) -> LossPass:  # fmt: skip
        """The way of a mini-batch to its loss."""
        size, labels = self._batch_size(inputs), None
        if isinstance(inputs, Mapping):
            labels = inputs.get("shift_labels", inputs.get("labels"))
            if trim.trim_backward in ("auto", "sparse") and compiled:
                mark_batch_dynamic(inputs, size)
        batch = TrimmedBatch(
            trim,
            keep,
            size,
            mode == "sparse",
            self._generator(trim),
            labels,
            self._process_group(trim, keep),
            self._masses.means(self.state) if trim.is_adaptive else [],
        )
        is_plain = getattr(compute_loss, "__func__", None) is Trainer.compute_loss
        is_outside = not is_plain or self.compute_loss_func is not None or self.label_smoother is not None
        return LossPass(
            compute_loss,
            model,
            self._inner_model(),
            compiled,
            batch,
            head,
            self._score,
            self._fused_loss(),
            is_outside or has_outputs,
        )

    def _choose_in_step(self, first: LossPass, new_pass: Callable[[Any], LossPass], *args: Any, **kwargs: Any) -> None:
        """In a replay of mini-batches with one sample: score the others of the step as well, and choose among all."""
        # In several processes the engines would wait for a forward pass that is left out.
        if self._number or len(self._step_inputs) < 2 or self.accelerator.num_processes > 1:
            return
        passes = {}
        for number, inputs in enumerate(self._step_inputs[1:], 1):
            inputs = self._prepare_inputs(inputs)
            passes[number] = new_pass(inputs)
            passes[number].score(inputs, *args, **kwargs)
        if all(loss_pass.batch.most_items == 1 for loss_pass in passes.values()):
            choose_in_step([first, *passes.values()])
            self._scored = passes

    def _batch_size(self, inputs: Any) -> int:
        """Number B of samples: that of the labels, since a sample may have several images."""
        if isinstance(inputs, Mapping):
            for name in (*self.label_names, "labels"):
                if isinstance(inputs.get(name), Tensor) and inputs[name].dim():
                    return len(inputs[name])
        return find_batch_size(inputs) or 1

    def _chunked_head(self, trim: TrimmingConfig, inner: nn.Module, keep: float) -> LMHead | None:
        """The language-model head whose logits are computed in chunks, if the model has one that can be."""
        if trim.trim_backward not in ("auto", "sparse") or self.compute_loss_func is not None:
            return None
        if self.label_smoother is not None or self.is_fsdp_enabled or self._fused_loss() is not None:
            return None  # TRL's `SFTTrainer` has chunks of its own
        module = find_lm_head(inner)
        return None if module is None else LMHead(module, keep_all=keep == 1)

    def _fused_loss(self) -> str | None:
        """The `loss_type` of TRL's `SFTTrainer`, whose models return log-probabilities of the labels."""
        is_sft = any(x.__name__ == "SFTTrainer" and x.__module__.startswith("trl.") for x in type(self).__mro__)
        return getattr(self.args, "loss_type", None) if is_sft else None

    def _counted(self) -> dict[str, Any]:
        """What TRL's trainers count in `compute_loss`, which a replay calls twice."""
        names = ("_metrics", "_total_train_tokens")
        return {name: copy.deepcopy(vars(self)[name]) for name in names if name in vars(self)}

    def _choose_backward(
        self,
        trim: TrimmingConfig,
        model: nn.Module,
        keep: float,
        has_head: bool,
        graphs_on_rows: bool,
        per_sample: bool,
    ) -> tuple[str, str]:
        """The backward pass of this mini-batch, and the reason for it."""
        if keep == 1:
            return "dense", "asked for"  # nothing is left out
        refused = CUDA_GRAPHS if graphs_on_rows and uses_cuda_graphs(model) else next(iter(refused_graphs()), "")
        mode, reason = choose_backward(trim.trim_backward, model, per_sample, keep, has_head, refused)
        if mode == "sparse" and is_timed(self.args, trim):
            return self._timing.choose(self.state, None if trim.is_adaptive else keep)
        return mode, reason

    def _note(self, trim: TrimmingConfig, batch: TrimmedBatch, choice: tuple[str, str]) -> None:
        """What the mini-batch has shown: log each choice and its reason once, and what the user should know."""
        if self._batches is not None:
            self._batches.append(batch)
        self._trimming_logs.add(batch)
        self._per_sample = batch.per_sample
        if batch.keeps_all:
            return
        mode, reason = choice
        if trim.trim_strict and mode != "sparse":
            raise ValueError(f"trim_strict=True, and the backward pass would be {mode}: {reason}. Set it to False.")
        self._notices.tell_backward(mode, reason)
        self._notices.tell_batch(batch)

    # ---- logs -----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        Add what was trimmed since the last log to the training logs.

        Args:
            logs (`dict[str, float]`): The values to log.
            start_time (`float`, *optional*): The start of training.
        """
        if "loss" in logs and not self.trim.trims:
            logs.update({"keep_fraction": 1.0, "kept_fraction": 1.0, "full_loss": logs["loss"]})
        elif "loss" in logs:
            self._notices.tell_fallbacks(fallback_report())
            logs.update(self._trimming_logs.take(self.accelerator, self.args.device, self.state.global_step))
        super().log(logs, start_time)
        if self.trim.trims and self.is_in_train:
            self._notices.tell_harm(self.state.log_history, self.args, self.trim)


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
    by the number of all items, so that `loss` is below `full_loss`.

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
