"""
The whole way: batch → per-item losses → keep decision → trimmed backward → logs.

Where to find each step, e.g. of B = 8 samples of which p = 0.25 are kept:

1. batch: `Trainer` gives it to [`TrimmingMixin.compute_loss`]; what cannot be trimmed was refused before
   (`checks.py`).
2. per-item losses `[8]`: caught where the model calls torch's loss functions (`losses.py`).
3. keep decision `[2]`: p comes from [`TrimmingMixin.keep_fraction`] (`schedule.py`), the indices of the kept items
   from [`~hf_trim.trainer.selection.select_items`]; `batch.py` makes of them the scalar loss of the kept items.
4. trimmed backward: the way is chosen in [`TrimmingMixin._choose_backward`] (`hf_trim/backward`).
5. logs: [`TrimmingMixin.log`] (`logs.py`).
"""

import logging
import random
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, Trainer, TrainingArguments

from hf_trim._compat import unwrap_peft_model
from hf_trim.backward.choice import choose_backward, is_compiled
from hf_trim.backward.compiled.backend import CUDA_GRAPHS, keep_backward_graphs, mark_batch_dynamic, uses_cuda_graphs
from hf_trim.backward.replay import rows_of, scoring
from hf_trim.backward.settings import REFUSED_GRAPHS, checked, fallback_report, reset_fallbacks, strict
from hf_trim.hub.push import PushMixin
from hf_trim.trainer.arguments import TrimmingConfig
from hf_trim.trainer.batch import TrimmedBatch
from hf_trim.trainer.checkpoints import load_converted_weights
from hf_trim.trainer.checks import check_cuda_graphs, check_head, check_liger_kernel, check_parallelism
from hf_trim.trainer.compiled_loss import recompute_loss
from hf_trim.trainer.heads import PASS_A_LOSS, item_unit
from hf_trim.trainer.lm_head import LMHead, find_lm_head
from hf_trim.trainer.logs import TrimmingLogs
from hf_trim.trainer.losses import LossCall, LossCalls, labelled_losses, smoothed_losses
from hf_trim.trainer.process_group import ProcessGroup
from hf_trim.trainer.schedule import keep_fraction, schedule_unit
from hf_trim.trainer.step_share import BatchLabels, OptimizerStep, StepShare


logger = logging.getLogger(__name__)


class TrimmingMixin(PushMixin):
    """
    Mini-batch trimming for any subclass of [`~transformers.Trainer`]. Name it before that class:

    ```python
    class TrimmingSeq2SeqTrainer(TrimmingMixin, Seq2SeqTrainer):
        pass
    ```

    It takes the trainer's arguments. To set the `trim_*` fields, let the training arguments inherit from
    [`~hf_trim.trainer.arguments.TrimmingConfig`] as well: `@dataclass class Args(TrimmingConfig,
    Seq2SeqTrainingArguments)`. What is trimmed are the means that torch's loss functions take in the model's forward
    pass ([`TrimmingTrainer`]).

    Raises:
        `ValueError`: If the model's head, or the way of training, is not supported.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, TrainingArguments):
                check_liger_kernel(value)
        self._unwrapped_cache: tuple[nn.Module, nn.Module] | None = None  # the model, with and without wrappers
        super().__init__(*args, **kwargs)
        self.trim: TrimmingConfig = self.args if isinstance(self.args, TrimmingConfig) else TrimmingConfig()
        self._user_loss = self.compute_loss_func
        check_parallelism(self.args, self.trim, max(self.get_cp_size(), self.get_sp_size()))
        check_cuda_graphs(self.args, self.trim, cast(nn.Module, self.model))
        # What an item of the model's loss is; for a loss function of the user's, the labels of a batch tell it.
        self._item_unit = None if self._user_loss is not None else item_unit(self._inner_model())
        if self._item_unit is not None:
            config = cast(PreTrainedConfig, self._inner_model().config)
            check_head(self.args, self.trim, self._item_unit, config)
        # Whether we compute the loss. It then is this mini-batch's part of the mean over all kept items of the step,
        # and `Trainer` must not divide it by the number of mini-batches.
        self._computes_step_mean = self.trim.trims or self._user_loss is not None
        if self._computes_step_mean:
            self.loss_is_scaled_for_ga = True
        if self._user_loss is not None:
            self.compute_loss_func = self._reduced_user_loss
        if self.label_smoother is not None:
            self._label_smoother: Any = self.label_smoother
            self.label_smoother = cast(Any, self._reduced_smoothed_loss)  # it is called in the same way
        self._batch: TrimmedBatch | None = None  # the mini-batch whose loss is being computed
        self._step = OptimizerStep()
        self._skip_base_model = False  # until a forward pass has shown that the base model calls no loss function
        self._warned: set[str | tuple[str, str]] = set()  # what need not be logged again
        self._trimming_logs = TrimmingLogs()
        reset_fallbacks()

    def _unwrapped(self) -> nn.Module:
        """The model without accelerate's wrappers. To find it takes a millisecond, so it is remembered."""
        assert self.model is not None
        if self._unwrapped_cache is None or self._unwrapped_cache[0] is not self.model:
            self._unwrapped_cache = (self.model, self.accelerator.unwrap_model(self.model))
        return self._unwrapped_cache[1]

    def _inner_model(self) -> nn.Module:
        """The model without accelerate's and PEFT's wrappers."""
        return unwrap_peft_model(self._unwrapped())

    # ---- the trainer's state --------------------------------------------------------------------------------------

    @property
    def keep_fraction(self) -> float:
        """The fraction p of the next mini-batch that shall be kept; how p falls is in `schedule.py`."""
        if not self.trim.trims:
            return 1.0
        args, state = self.args, self.state
        return keep_fraction(
            self.trim.trim_keep_start,
            self.trim.trim_keep_end,
            schedule_unit(self.trim.trim_schedule, args.num_train_epochs, args.max_steps),
            epoch=state.epoch or 0.0,
            num_epochs=args.num_train_epochs,
            step=state.global_step,
            num_steps=state.max_steps,
        )

    def _generator(self) -> torch.Generator | None:
        """For a random choice: seeded by the trainer's state alone, so that a resumed training repeats the choice."""
        if self.trim.trim_select != "random":
            return None
        state = (self.args.seed, self.state.global_step)
        seed: tuple[int, ...]
        if self.trim.trim_scope == "global":
            # All processes must make the same choice, however many mini-batches each of them has.
            seed = (*state, self._step.position)
        else:
            seed = (*state, self._step.remaining, self.args.process_index)
        return torch.Generator().manual_seed(random.Random(str(seed)).getrandbits(63))

    def _process_group(self, keep: float) -> ProcessGroup | None:
        if self.trim.trim_scope == "local" or keep == 1 or self.accelerator.num_processes == 1:
            return None
        return ProcessGroup(lambda values: self.accelerator.gather(values[None]), self.args.process_index)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:
            load_converted_weights(cast(nn.Module, self.model if model is None else model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            assert self.model is not None and self.state.best_model_checkpoint is not None  # it was just loaded
            load_converted_weights(self.model, self.state.best_model_checkpoint)

    # ---- a training step ------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step.begin(batch_samples)
        return batch_samples, num_items_in_batch

    def training_step(self, *args, **kwargs) -> Tensor:
        with strict(self.trim.trim_strict), checked(self.trim.trim_check):
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """
        The trimmed loss while training, the loss of the whole batch otherwise.

        Args:
            model (`torch.nn.Module`): The model, possibly wrapped.
            inputs (`dict[str, torch.Tensor]`): The batch, with `labels`.
            return_outputs (`bool`, *optional*, defaults to `False`): Whether to return the outputs as well.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): Number of labels in the optimizer step.

        Returns:
            `torch.Tensor` or `tuple`: The scalar loss, or loss and outputs.

        Raises:
            `ValueError`: If the batch has no labels, or the model calls no loss function of torch.
        """
        if not (model.training and self._computes_step_mean):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if all(inputs.get(name) is None for name in (*self.label_names, "labels", "shift_labels")):
            raise ValueError(
                f"The batch has no 'labels', only {sorted(inputs)}: TrimmingTrainer ranks samples by their loss. Name "
                "the label column 'labels', or let the data collator do so."
            )
        keep = self.keep_fraction
        labels = BatchLabels.of(inputs)
        has_graphs = is_compiled(model)
        is_loss_compiled = self._user_loss is None and has_graphs
        head = None if is_loss_compiled else self._chunked_head(keep)
        graphs_on_rows = has_graphs and self.trim.trim_backward in ("auto", "sparse")
        backward = self._choose_backward(model, labels, keep, head is not None, graphs_on_rows)
        if graphs_on_rows:
            mark_batch_dynamic(inputs, labels.size)
        self._batch = self._trimmed_batch(model, labels, keep, backward, num_items_in_batch)
        try:
            if backward == "replay":
                with scoring(model):
                    self._run(model, inputs, None, is_loss_compiled, True, num_items_in_batch)
                inputs = rows_of(inputs, self._batch.begin_replay(), labels.size)
            with keep_backward_graphs() if graphs_on_rows else nullcontext():
                loss, outputs = self._run(model, inputs, head, is_loss_compiled, return_outputs, num_items_in_batch)
            if not self._batch.is_done:
                raise ValueError(
                    f"{type(self._inner_model()).__name__} called none of torch's loss functions in its forward pass: "
                    f"there is nothing to rank. {PASS_A_LOSS}"
                )
            self._warn_of_dropped(self._batch.dropped)
            self._trimming_logs.add(keep, self._batch)
            if self._step.remaining <= 1:
                for _ in range(self._step.missing_batches):
                    self._batch.join_without_items()
                self._step.missing_batches = 0
        finally:
            self._batch = None
        self._step.advance()
        return (loss, outputs) if return_outputs else loss

    def _trimmed_batch(
        self, model: nn.Module, labels: BatchLabels, keep: float, backward: str, num_items: Tensor | int | None
    ) -> TrimmedBatch:
        process_group = self._process_group(keep)

        def share(call: LossCall, per_token: bool) -> StepShare:
            # A head with a loss per token may by chance have as many losses as samples.
            per_token = per_token or self._item_unit == "token"
            is_global = process_group is not None
            return self._step.share(keep, call, per_token, labels, is_global, self.accelerator, self.args)

        # The engines average gradients over the processes, but our means are over the items of all processes.
        # `Trainer` multiplies by the number of processes itself where it believes that the model has divided the loss
        # by the number of labels.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        trainer_scales = num_items is not None and bool(self.model_accepts_loss_kwargs or self.compute_loss_func)
        return TrimmedBatch(
            self.trim,
            keep,
            backward,
            labels.size,
            share=share,
            zero=lambda: cast(Tensor, sum(p.sum() * 0 for p in model.parameters() if p.requires_grad)),
            generator=self._generator(),
            num_items=num_items,
            mean_scale=1.0 if trainer_scales else float(processes),
            labels=labels.tensors.get("shift_labels", labels.tensors.get("labels")),
            process_group=process_group,
        )

    def _chunked_head(self, keep: float) -> LMHead | None:
        """The language-model head whose logits are computed in chunks, if the model has one that can be."""
        if self.trim.trim_backward not in ("auto", "sparse") or self._user_loss is not None:
            return None
        if self.label_smoother is not None or self.is_fsdp_enabled:
            return None
        module = find_lm_head(self._inner_model())
        return None if module is None else LMHead(module, keep_all=keep == 1)

    def _choose_backward(
        self, model: nn.Module, labels: BatchLabels, keep: float, has_chunked_head: bool, graphs_on_rows: bool
    ) -> str:
        """The backward pass of this mini-batch; the log tells each choice and its reason once."""
        if keep == 1:
            return "dense"  # nothing is left out
        unit = self._item_unit
        if unit is None:
            target = labels.tensors.get("labels")
            unit = "sample" if target is None or target.dim() == 1 else "token"
        per_sample = "sample" in (unit, self.trim.trim_unit)
        refused = CUDA_GRAPHS if graphs_on_rows and uses_cuda_graphs(model) else next(iter(REFUSED_GRAPHS), "")
        mode, reason = choose_backward(self.trim.trim_backward, model, per_sample, keep, has_chunked_head, refused)
        if (mode, reason) not in self._warned and reason != "asked for":
            logger.warning("Trimmed batches use the %s backward pass: %s.", mode, reason)
        self._warned.add((mode, reason))
        return mode

    # ---- running the model's loss ---------------------------------------------------------------------------------

    def _run(
        self, model, inputs, head: LMHead | None, is_loss_compiled: bool, return_outputs: bool, num_items_in_batch
    ) -> tuple[Tensor, Any]:
        """`Trainer`'s own way to the loss, in which the model's loss is replaced by the trimmed one."""
        if is_loss_compiled:
            _, outputs = super().compute_loss(model, inputs.copy(), True, num_items_in_batch)
            return self._compiled_loss(outputs, inputs, num_items_in_batch), outputs
        assert self._batch is not None
        inner = self._inner_model()
        base_model = getattr(inner, "base_model", None)
        if not isinstance(base_model, nn.Module) or base_model is inner:
            base_model = None
        with LossCalls(self._batch.batch_size, head, base_model, self._skip_base_model) as losses:
            # Inside of the wrappers: DDP and FSDP look for the loss's graph in what the wrapped model returns.
            hook = self._unwrapped().register_forward_hook(
                lambda module, args, outputs: self._trim_outputs(outputs, losses), prepend=True
            )
            try:
                result: Any = super().compute_loss(model, inputs.copy(), return_outputs, num_items_in_batch)
            finally:
                hook.remove()
        self._skip_base_model = base_model is not None and not losses.called_in_base_model
        return result if return_outputs else (result, None)

    def _trim_outputs(self, outputs: Any, losses: LossCalls) -> Any:
        """Put the trimmed loss in the place of the model's loss."""
        if getattr(outputs, "log_probs", None) is not None and getattr(outputs, "label_mask", None) is not None:
            self._weigh_log_probs(outputs)
        if not losses.calls:
            return None
        has_names = isinstance(outputs, dict)
        loss = outputs.get("loss") if has_names else outputs[0]
        if loss is None:
            return None
        assert self._batch is not None
        loss = self._batch(loss, losses.calls)
        losses.calls = []
        if not has_names:
            return (loss, *outputs[1:])
        outputs["loss"] = loss
        return outputs

    def _weigh_log_probs(self, outputs: Any) -> None:
        """TRL's models return log-probabilities of tokens, which `SFTTrainer` sums up and divides by their number."""
        assert self._batch is not None
        losses = -outputs.log_probs.detach().float()
        losses.requires_grad_()
        call = LossCall(losses, outputs.label_mask.to(losses), "sum")
        (weights,) = torch.autograd.grad(self._batch(call.value.clone(), [call]), losses)
        outputs.log_probs = outputs.log_probs * weights

    def _reduced_user_loss(self, outputs, labels, num_items_in_batch=None) -> Tensor:
        """In the place of `compute_loss_func`, whose losses are unreduced: their trimmed mean, or their mean."""
        assert self._user_loss is not None
        call = labelled_losses(self._user_loss(outputs, labels, num_items_in_batch=num_items_in_batch), labels)
        return self._batch(call.value.clone(), [call]) if self._batch is not None else call.value

    def _reduced_smoothed_loss(self, outputs, labels, shift_labels=False, num_items_in_batch=None) -> Tensor:
        """In the place of `label_smoother`: the trimmed mean of the smoothed losses, or their mean."""
        if self._batch is None:
            return self._label_smoother(
                outputs, labels, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch
            )
        call = smoothed_losses(outputs, labels, self.args.label_smoothing_factor, shift_labels)
        return self._batch(call.value.clone(), [call])

    def _compiled_loss(self, outputs, inputs, num_items_in_batch) -> Tensor:
        assert self._batch is not None
        # With a scale of 1 it is `Trainer` that has multiplied the model's loss by the number of processes.
        scale = self.accelerator.num_processes if self._batch.mean_scale == 1 else 1
        returned_loss = outputs["loss"].mean().item() / scale
        size = self._batch.batch_size
        loss, calls = recompute_loss(self._inner_model(), inputs, outputs, returned_loss, size, num_items_in_batch)
        return self._batch(loss, calls) * scale

    # ---- logs -----------------------------------------------------------------------------------------------------

    def _warn_of_dropped(self, count: int) -> None:
        if count and "dropped" not in self._warned:
            self._warned.add("dropped")
            logger.warning(
                "%d samples of a mini-batch have losses that are NaN or infinite, and were dropped. Later samples of "
                "this kind are dropped without a message.", count,
            )  # fmt: skip

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        Add what was trimmed since the last log to the training logs.

        Args:
            logs (`dict[str, float]`): The values to log.
            start_time (`float`, *optional*): The start of training.
        """
        if "loss" in logs and not self._computes_step_mean:
            logs.update({"keep_fraction": 1.0, "kept_fraction": 1.0, "full_loss": logs["loss"]})
        elif "loss" in logs:
            if (fallbacks := fallback_report()) and "fallbacks" not in self._warned:
                counts = ", ".join(f"{name} {count}×" for name, count in fallbacks.items())
                self._warned.add("fallbacks")
                logger.warning("Operations without a row-sparse rule ran dense: %s. Gradients are the same.", counts)
            logs.update(self._trimming_logs.take(self.accelerator, self.args.device))
        super().log(logs, start_time)


class TrimmingTrainer(TrimmingMixin, Trainer):
    """
    [`~transformers.Trainer`] with mini-batch trimming (arXiv 2110.13058): of each mini-batch only the fraction p with
    the highest loss counts, and p falls linearly during training. Evaluation and prediction are never trimmed. With
    `trim_keep_start=trim_keep_end=1` or `trim_select="none"` it is the plain `Trainer`.

    An item is what the head's loss is a mean over: a sample for classification, regression, question answering,
    multiple choice, next-sentence prediction and CTC; a token (or pixel) for causal, masked and sequence-to-sequence
    language modelling, token classification and semantic segmentation. With `trim_unit="sample"` the latter heads are
    trimmed by samples, too: these are ranked by the mean over their tokens, and all tokens of a kept sample count.
    Labels of −100 (or what else the head ignores) are no items.

    Each training log has, averaged over the mini-batches since the last log: `keep_fraction` (p, the fraction that was
    asked for), `kept_fraction` (the fraction that was really kept, which differs from p by rounding), `trim_threshold`
    (the lowest loss that was kept) and `full_loss` (the mean loss of the whole mini-batch, comparable with the `loss`
    of plain training). `loss` is the trimmed one.

    With gradient accumulation the loss is the mean over all items that the mini-batches of a step keep, whatever their
    sizes. (Plain `Trainer` forgets to divide by the number of mini-batches for heads that take `num_items_in_batch`
    and ignore it, such as `BertForSequenceClassification`.)

    Args:
        args ([`TrimmingArguments`] or [`~transformers.TrainingArguments`], *optional*):
            Training arguments; without `trim_*` fields the defaults of [`TrimmingArguments`] hold.
        compute_loss_func (`Callable`, *optional*):
            `f(outputs, labels, num_items_in_batch=None)` that returns an *unreduced* loss: one value per sample
            `[B]`, or one per label in the shape of the labels, of which those of −100 are no items. Needed for other
            heads, and for losses of your own (class weights, focal loss). Evaluation reports its mean.
        kwargs: All other arguments of [`~transformers.Trainer`].

    Raises:
        `ValueError`: If the model's head, or the way of training, is not supported.
    """
