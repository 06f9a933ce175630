"""`TrimmingTrainer`: batch → losses that the model calls → kept items → the loss of the kept."""

import inspect
import logging
import random
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import unwrap_peft_model

from hf_trim.backward.choice import choose_backward, is_compiled
from hf_trim.backward.compiled.backend import CUDA_GRAPHS, keep_backward_graphs, mark_batch_dynamic, uses_cuda_graphs
from hf_trim.backward.replay import rows_of, scoring
from hf_trim.backward.settings import REFUSED_GRAPHS, checked, fallback_report, reset_fallbacks, strict
from hf_trim.hub.push import PushMixin
from hf_trim.trainer.arguments import TrimmingConfig
from hf_trim.trainer.batch import ProcessGroup, StepShare, TrimmedBatch, step_share
from hf_trim.trainer.checkpoints import load_converted_weights
from hf_trim.trainer.heads import HOW_TO_PASS_A_LOSS, item_unit
from hf_trim.trainer.lm_head import LMHead, find_lm_head
from hf_trim.trainer.losses import LossCall, LossCalls, labelled_losses, smoothed_losses, valid_items
from hf_trim.trainer.schedule import keep_fraction, schedule_unit
from hf_trim.trainer.selection import num_kept


logger = logging.getLogger(__name__)
LOGGED = ("keep_fraction", "kept_fraction", "trim_threshold", "full_loss")


class TrimmingMixin(PushMixin):
    """
    Mini-batch trimming for any subclass of [`~transformers.Trainer`], named before it:

    ```python
    class TrimmingSeq2SeqTrainer(TrimmingMixin, Seq2SeqTrainer):
        pass
    ```

    Its arguments are those of the trainer, `trim_*` fields included if they are an instance of
    [`~hf_trim.trainer.arguments.TrimmingConfig`] as well: `@dataclass class Args(TrimmingConfig,
    Seq2SeqTrainingArguments)`.
    What is trimmed are the means that torch's loss functions take in the model's forward pass ([`TrimmingTrainer`]).

    Raises:
        `ValueError`: If the model's head is not supported, or the way of training is not.
    """

    def __init__(self, *args, **kwargs):
        self._refuse_arguments([*args, *kwargs.values()])
        self._found: tuple[nn.Module, nn.Module] | None = None  # the model, and what is inside of it
        super().__init__(*args, **kwargs)
        self.trim = self.args if isinstance(self.args, TrimmingConfig) else TrimmingConfig()
        self._user_loss = self.compute_loss_func
        self._unit = self._refuse_unsupported()
        # Whether the loss is ours: then it is this mini-batch's part of the mean over all kept items of the step.
        self._own_loss = self.trim.trims or self._user_loss is not None
        if self._own_loss:
            self.loss_is_scaled_for_ga = True
        if self._user_loss is not None:
            self.compute_loss_func = self._reduced_user_loss
        if self.label_smoother is not None:
            self._label_smoother, self.label_smoother = self.label_smoother, self._reduced_smoothed_loss
        self._batch: TrimmedBatch | None = None
        self._step_batches: list[tuple[int, dict]] = []
        self._step_position = 0
        self._step_counts: dict[Any, list[int]] = {}
        self._missing_batches = 0  # mini-batches of this step that other processes have more than this one
        self._warned = set()
        self._skip_body = False  # until a forward pass has shown that the model's body calls no loss function
        reset_fallbacks()
        self._logged_sums = torch.zeros(len(LOGGED) + 1, dtype=torch.float64)

    # ---- what cannot be trimmed -----------------------------------------------------------------------------------

    def _refuse_arguments(self, given: list) -> None:
        args = next((each for each in given if isinstance(each, TrainingArguments)), None)
        if args is None or not args.use_liger_kernel:
            return
        config = args.liger_kernel_config or {}
        if any(config.get(name, True) for name in ("fused_linear_cross_entropy", "cross_entropy")):
            raise ValueError(
                "use_liger_kernel=True replaces the loss by a fused one that has no losses per item to rank. Leave it "
                "out (trimming computes large language-model heads in chunks, too), or keep Liger's other kernels: "
                "liger_kernel_config={'fused_linear_cross_entropy': False, 'cross_entropy': False}."
            )

    def _refuse_unsupported(self) -> str | None:
        """What an item of the model's loss is; `None` if the loss is the user's."""
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
        if self.trim.trim_scope == "global" and not self.args.average_tokens_across_devices:
            raise ValueError(
                "trim_scope='global' is a mean over the items of all devices: leave average_tokens_across_devices at "
                "True, or use trim_scope='local'."
            )
        with_cuda_graphs = self.args.torch_compile_mode in ("reduce-overhead", "max-autotune")
        if self.trim.trim_backward == "sparse" and (with_cuda_graphs or uses_cuda_graphs(self.model)):
            raise ValueError(
                f"trim_backward='sparse' cannot go with CUDA graphs: {CUDA_GRAPHS}. Compile in another mode, or set "
                "trim_backward='auto'."
            )
        if self._user_loss is not None:
            return None
        model = self._inner_model()
        unit = item_unit(model)
        if unit == "sample" and self.trim.trim_unit == "token":
            raise ValueError(
                "trim_unit='token' needs a loss per token, and this head has one per sample: use trim_unit='auto' "
                f"or 'sample'. {HOW_TO_PASS_A_LOSS}"
            )
        smoothing, config = self.args.label_smoothing_factor, model.config
        if smoothing and (getattr(config, "problem_type", None) == "regression" or config.num_labels == 1):
            raise ValueError(
                f"label_smoothing_factor={smoothing} has no meaning for regression: set it to 0, or give the "
                "model more than one label."
            )
        return unit

    def _unwrapped(self) -> nn.Module:
        """The model without what accelerate put around it, which takes a millisecond to find."""
        if self._found is None or self._found[0] is not self.model:
            self._found = (self.model, self.accelerator.unwrap_model(self.model))
        return self._found[1]

    def _inner_model(self) -> nn.Module:
        return unwrap_peft_model(self._unwrapped())

    # ---- state ----------------------------------------------------------------------------------------------------

    @property
    def keep_fraction(self) -> float:
        """The fraction p of the next mini-batch that is kept."""
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
        self._step_batches = [self._labels_of(batch) for batch in batch_samples]
        self._step_position, self._step_counts = 0, {}
        return batch_samples, num_items_in_batch

    def _labels_of(self, batch: Mapping) -> tuple[int, dict]:
        names = ("labels", "shift_labels")
        return find_batch_size(batch), {name: batch[name] for name in names if isinstance(batch.get(name), Tensor)}

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
        if not (model.training and self._own_loss):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if all(inputs.get(name) is None for name in (*self.label_names, "labels", "shift_labels")):
            raise ValueError(
                f"The batch has no 'labels', only {sorted(inputs)}: TrimmingTrainer ranks samples by their loss. Name "
                "the label column 'labels', or let the data collator do so."
            )
        keep = self.keep_fraction
        size, labels = self._labels_of(inputs)
        has_graphs = is_compiled(model)
        compiled = self._user_loss is None and has_graphs
        head = None if compiled else self._chunked_head(keep)
        on_rows = has_graphs and self.trim.trim_backward in ("auto", "sparse")
        backward = self._backward_mode(model, labels, keep, head is not None, on_rows)
        if on_rows:
            mark_batch_dynamic(inputs, size)
        # Gradients are averaged over the processes, while means are over the items of all of them; `Trainer` allows
        # for that where it believes that the model divides by the number of labels.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        counted = num_items_in_batch is not None and bool(self.model_accepts_loss_kwargs or self.compute_loss_func)
        self._batch = TrimmedBatch(
            self.trim,
            keep,
            backward,
            size,
            share=lambda call, per_token: self._share(keep, call, per_token, size, labels),
            zero=lambda: sum(p.sum() * 0 for p in model.parameters() if p.requires_grad),
            generator=self._generator(),
            num_items=num_items_in_batch,
            mean_scale=1.0 if counted else float(processes),
            labels=labels.get("shift_labels", labels.get("labels")),
            process_group=self._process_group(keep),
        )
        try:
            if backward == "replay":
                with scoring(model):
                    self._run(model, inputs, None, compiled, True, num_items_in_batch)
                inputs = rows_of(inputs, self._batch.begin_replay(), size)
            with keep_backward_graphs() if on_rows else nullcontext():
                loss, outputs = self._run(model, inputs, head, compiled, return_outputs, num_items_in_batch)
            if not self._batch.is_done:
                raise ValueError(
                    f"{type(self._inner_model()).__name__} called none of torch's loss functions in its forward pass: "
                    f"there is nothing to rank. {HOW_TO_PASS_A_LOSS}"
                )
            self._record(keep, self._batch)
            if self._step_position + 1 >= len(self._step_batches):
                for _ in range(self._missing_batches):
                    self._batch.join_without_items()
                self._missing_batches = 0
        finally:
            self._batch = None
        self._step_position += 1
        return (loss, outputs) if return_outputs else loss

    def _run(self, model, inputs, head, compiled, return_outputs, num_items_in_batch) -> tuple[Tensor, Any]:
        """The trainer's own way to the loss, with our hands on the model's loss functions."""
        if compiled:
            _, outputs = super().compute_loss(model, inputs.copy(), True, num_items_in_batch)
            return self._loss_of_compiled(outputs, inputs, num_items_in_batch), outputs
        inner = self._unwrapped()
        body = getattr(self._inner_model(), "base_model", None)
        body = body if isinstance(body, nn.Module) and body is not self._inner_model() else None
        with LossCalls(self._batch.batch_size, head, body, self._skip_body) as losses:
            hook = inner.register_forward_hook(lambda *given: self._trim_outputs(given[-1], losses), prepend=True)
            try:
                result = super().compute_loss(model, inputs.copy(), return_outputs, num_items_in_batch)
            finally:
                hook.remove()
        self._skip_body = body is not None and not losses.called_in_body
        return result if return_outputs else (result, None)

    def _trim_outputs(self, outputs: Any, losses: LossCalls) -> Any:
        """Put the trimmed loss in the place of the model's; inside the model, where no wrapper has seen it yet."""
        if getattr(outputs, "log_probs", None) is not None and getattr(outputs, "label_mask", None) is not None:
            self._weigh_log_probs(outputs)
        if not losses.calls:
            return None
        named = isinstance(outputs, dict)
        loss = outputs.get("loss") if named else outputs[0]
        if loss is None:
            return None
        loss = self._batch(loss, losses.calls)
        losses.calls = []
        if not named:
            return (loss, *outputs[1:])
        outputs["loss"] = loss
        return outputs

    def _weigh_log_probs(self, outputs: Any) -> None:
        """TRL's models return log-probabilities of tokens, which `SFTTrainer` sums up and divides by their number."""
        losses = -outputs.log_probs.detach().float()
        losses.requires_grad_()
        call = LossCall(losses, outputs.label_mask.to(losses), "sum")
        (weights,) = torch.autograd.grad(self._batch(call.value.clone(), [call]), losses)
        outputs.log_probs = outputs.log_probs * weights

    def _reduced_user_loss(self, outputs, labels, num_items_in_batch=None) -> Tensor:
        call = labelled_losses(self._user_loss(outputs, labels, num_items_in_batch=num_items_in_batch), labels)
        return self._batch(call.value.clone(), [call]) if self._batch is not None else call.value

    def _reduced_smoothed_loss(self, outputs, labels, shift_labels=False, num_items_in_batch=None) -> Tensor:
        if self._batch is None:
            return self._label_smoother(
                outputs, labels, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch
            )
        call = smoothed_losses(outputs, labels, self.args.label_smoothing_factor, shift_labels)
        return self._batch(call.value.clone(), [call])

    def _loss_of_compiled(self, outputs, inputs, num_items_in_batch) -> Tensor:
        """Loss functions inside a compiled graph are out of reach: the model's own is called again, on its logits."""
        model = self._inner_model()
        given = {**inputs, **outputs, "config": model.config, "pooled_logits": outputs.get("logits")}
        if outputs.get("logits") is not None:
            given["vocab_size"] = outputs["logits"].shape[-1]
        names = inspect.signature(model.loss_function).parameters
        given = {name: given[name] for name in names if name in given}
        scale = self.accelerator.num_processes if self._batch.mean_scale == 1 else 1  # by `Trainer`, of its loss
        theirs = outputs["loss"].mean().item() / scale
        for divisor in ({"num_items_in_batch": num_items_in_batch}, {}):  # not all models divide by it
            with LossCalls(self._batch.batch_size) as losses:
                try:
                    loss = model.loss_function(**given, **divisor)
                except TypeError as error:
                    raise ValueError(f"The loss of compiled {type(model).__name__} is not known: {error}.") from None
            if abs(loss.item() - theirs) <= 1e-3 + 0.01 * abs(theirs):
                return self._batch(loss, losses.calls) * scale
        raise ValueError(
            f"The compiled {type(model).__name__} returned the loss {theirs:.6g}, and its loss function gives "
            f"{loss.item():.6g} for its logits. Do not compile it, or pass compute_loss_func. {HOW_TO_PASS_A_LOSS}"
        )

    def training_step(self, *args, **kwargs):
        with strict(self.trim.trim_strict), checked(self.trim.trim_check):
            return super().training_step(*args, **kwargs)

    def _chunked_head(self, keep: float) -> LMHead | None:
        if self.trim.trim_backward not in ("auto", "sparse") or self._user_loss is not None:
            return None
        if self.label_smoother is not None or self.is_fsdp_enabled:
            return None
        module = find_lm_head(self._inner_model())
        return None if module is None else LMHead(module, keep_all=keep == 1)

    def _backward_mode(self, model: nn.Module, labels: dict, keep: float, chunked_head: bool, on_rows: bool) -> str:
        if keep == 1:
            return "dense"  # nothing is left out: each way is the plain one
        unit = self._unit
        if unit is None:
            unit = "sample" if labels.get("labels") is None or labels["labels"].dim() == 1 else "token"
        per_sample = "sample" in (unit, self.trim.trim_unit)
        refused = CUDA_GRAPHS if on_rows and uses_cuda_graphs(model) else next(iter(REFUSED_GRAPHS), "")
        mode, reason = choose_backward(self.trim.trim_backward, model, per_sample, keep, chunked_head, refused)
        if (mode, reason) not in self._warned and reason != "asked for":
            logger.warning("Backward pass of the trimmed batches: %s (%s).", mode, reason)
        self._warned.add((mode, reason))
        return mode

    def _share(self, keep: float, call: LossCall, per_token: bool, size: int, labels: dict) -> StepShare:
        """What this mini-batch is among those of its optimizer step, on all devices where those are summed."""
        per_token = per_token or self._unit == "token"  # even if there are by chance as many as samples
        if (per_token, keep) not in self._step_counts:
            # Outside of `train()` (a `training_step` of its own) the mini-batch stands alone.
            batches = self._step_batches or [(size, labels)]
            if per_token:
                found = int((call.counts > 0).sum())
                shifted = _num_labels(labels, call.ignore_index, shifted=False) != found
                counts = [_num_labels(each, call.ignore_index, shifted) for _, each in batches]
            else:
                counts = [_num_samples(*each) for each in batches]
            if self._process_group(keep) is not None:
                counts = self._counts_of_all(counts)
                totals = [sum(num_kept(keep, count) for count in counts), sum(counts)]
            else:
                totals = self._sum_over_devices([sum(num_kept(keep, count) for count in counts), sum(counts)])
            self._step_counts[per_token, keep] = (counts, totals)
        counts, totals = self._step_counts[per_token, keep]
        return step_share(keep, counts[min(self._step_position, len(counts) - 1)], *totals)

    def _process_group(self, keep: float) -> ProcessGroup | None:
        if self.trim.trim_scope == "local" or keep == 1 or self.accelerator.num_processes == 1:
            return None
        return ProcessGroup(lambda values: self.accelerator.gather(values[None]), self.args.process_index)

    def _counts_of_all(self, counts: list[int]) -> list[int]:
        """Of each mini-batch of the step, the items of all processes; some may have fewer mini-batches than others."""
        length = max(self.args.gradient_accumulation_steps, len(counts))
        own = torch.tensor([*counts, *[0] * (length - len(counts)), len(counts)], device=self.args.device)
        found = self.accelerator.gather(own[None])
        self._missing_batches = int(found[:, -1].max()) - len(counts)
        return found[:, :-1].sum(0).tolist()

    def _sum_over_devices(self, numbers: list[int]) -> list[int]:
        if not self.args.average_tokens_across_devices or self.accelerator.num_processes == 1:
            return numbers
        return self.accelerator.reduce(torch.tensor(numbers, device=self.args.device)).tolist()

    def _generator(self) -> torch.Generator | None:
        """A random choice that is a function of the state alone, so that a resumed training repeats it."""
        if self.trim.trim_select != "random":
            return None
        if self.trim.trim_scope == "global":  # all processes make the same choice, however many mini-batches they have
            place = (self.args.seed, self.state.global_step, self._step_position)
        else:
            to_come = len(self._step_batches) - self._step_position
            place = (self.args.seed, self.state.global_step, to_come, self.args.process_index)
        return torch.Generator().manual_seed(random.Random(str(place)).getrandbits(63))

    def _record(self, keep: float, batch: TrimmedBatch) -> None:
        if batch.dropped and "dropped" not in self._warned:
            self._warned.add("dropped")
            logger.warning(
                "%d samples of a mini-batch have losses that are NaN or infinite, and were dropped; so will others "
                "like them.", batch.dropped,
            )  # fmt: skip
        if batch.logged is None:
            return
        kept, valid, threshold, full_loss = torch.stack(batch.logged).tolist()
        self._logged_sums += torch.tensor([keep, kept / valid, threshold, full_loss, 1.0], dtype=torch.float64)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        Add what was trimmed since the last log to the training logs.

        Args:
            logs (`dict[str, float]`): The values to log.
            start_time (`float`, *optional*): The start of training.
        """
        if "loss" in logs and not self._own_loss:
            logs.update({"keep_fraction": 1.0, "kept_fraction": 1.0, "full_loss": logs["loss"]})
        elif "loss" in logs:
            if (fallbacks := fallback_report()) and "fallbacks" not in self._warned:
                counts = ", ".join(f"{name} {count}×" for name, count in fallbacks.items())
                self._warned.add("fallbacks")
                logger.warning("Operations without a row-sparse rule ran dense: %s. Gradients are the same.", counts)
            sums = self.accelerator.reduce(self._logged_sums.float().to(self.args.device)).tolist()
            if sums[-1] > 0:
                logs.update({name: value / sums[-1] for name, value in zip(LOGGED, sums[:-1], strict=True)})
            self._logged_sums.zero_()
        super().log(logs, start_time)


def _num_labels(labels: dict, ignore_index: int, shifted: bool) -> int:
    """Number of tokens that have a label; `shifted` where the first of a text predicts nothing."""
    if "shift_labels" in labels:
        return int((labels["shift_labels"] != ignore_index).sum())
    each = labels["labels"][..., 1:] if shifted else labels["labels"]
    return int((each != ignore_index).sum())


def _num_samples(size: int, labels: dict) -> int:
    """Number of samples that have a label."""
    each = labels.get("labels")
    return size if each is None or len(each) != size else int(valid_items(each, torch.Size([size])).sum())


class TrimmingTrainer(TrimmingMixin, Trainer):
    """
    [`~transformers.Trainer`] with mini-batch trimming (arXiv 2110.13058): of each mini-batch only the fraction p with
    the highest loss counts, and p falls linearly during training. Evaluation and prediction are never trimmed. With
    `trim_keep_start=trim_keep_end=1` or `trim_select="none"` it is the plain `Trainer`.

    Items are what the head's loss is a mean over: samples for classification, regression, question answering, multiple
    choice, next-sentence prediction and CTC; tokens (or pixels) for causal, masked and sequence-to-sequence language
    modelling, token classification and semantic segmentation. With `trim_unit="sample"` the latter are trimmed by the
    mean of each sample, whose tokens then all count. Labels of −100 (or whatever the head ignores) are no items.

    With each training log come `keep_fraction` (p), `kept_fraction` (the fraction really kept), `trim_threshold` (the
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
            label in the labels' shape, in which labels of −100 are no items. Needed for other heads, and for losses of
            your own (class weights, focal loss). Evaluation reports its mean.
        kwargs: All other arguments of [`~transformers.Trainer`].

    Raises:
        `ValueError`: If the model's head is not supported, or the way of training is not.
    """
