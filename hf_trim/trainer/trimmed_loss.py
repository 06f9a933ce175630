"""
Steps 1 to 4 of: batch → per-item losses → keep decision → trimmed backward → logs.

The way of one mini-batch through the trainer. For example, B = 8 samples and p = 0.25: `compute_loss` runs while calls
of torch's loss functions are caught (`loss_pass.py`), 2 samples are kept at its end (`batch.py`), and the loss that is
returned has the value of the 8, and the gradient of the 2.
"""

import copy
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_trim._compat import find_batch_size, unwrap_peft_model
from hf_trim.backward import waiting
from hf_trim.backward._compile_internals import compiled_modules, without_compilation
from hf_trim.backward.choice import choose_backward
from hf_trim.backward.compiled.backend import CUDA_GRAPHS, mark_batch_dynamic, uses_cuda_graphs
from hf_trim.backward.settings import refused_graphs
from hf_trim.backward.waiting import Later
from hf_trim.trainer.arguments import TrimmingConfig
from hf_trim.trainer.batch import TrimmedBatch
from hf_trim.trainer.dataset_scope import DatasetScopeMixin
from hf_trim.trainer.late_checks import LateChecks
from hf_trim.trainer.lm_head import LMHead, find_lm_head
from hf_trim.trainer.logs import TrimmingLogs
from hf_trim.trainer.loss_pass import LossPass, is_compiled_whole, without_reference
from hf_trim.trainer.losses import IGNORE_INDEX, MARK_LOSSES, loss_of, with_loss
from hf_trim.trainer.mass_history import MassHistory
from hf_trim.trainer.notices import Notices
from hf_trim.trainer.process_group import ProcessGroup, host_numbers
from hf_trim.trainer.ranking import NONFINITE_ADVICE
from hf_trim.trainer.schedule import keep_fraction, schedule_unit
from hf_trim.trainer.step_choice import choose_in_step
from hf_trim.trainer.timing import BackwardTiming, is_timed


class TrimmedLossMixin(DatasetScopeMixin):
    """The part of [`~hf_trim.trainer.trainer.TrimmingMixin`] that computes the loss of a mini-batch."""

    def __init__(
        self, *args: Any, trim_score: Callable[[Any, Any, Tensor], Tensor] | None = None, **kwargs: Any
    ) -> None:
        if trim_score is not None and not callable(trim_score):
            raise ValueError(
                "trim_score must be a function f(outputs, inputs, losses) that returns scores, and is "
                f"{trim_score!r}. Leave it out to rank items by their losses."
            )
        self._score = trim_score
        self._inner_cache: tuple[Any, Any] = None, None  # the model, with and without wrappers
        self._step_inputs: list = []  # the mini-batches of the optimizer step
        self._number = -1  # which of the step's mini-batches it is
        self._num_batches = 1  # of the step, at most, over the processes that choose together
        self._scored: dict[int, LossPass] = {}  # those that are scored before their turn, by their number
        self._batch: TrimmedBatch | None = None  # the mini-batch whose loss is being computed
        self._batches: list[TrimmedBatch] | None = None  # those of the training step under way
        self._has_loss = False  # whether `compute_loss` was called in it
        self._per_sample: bool | None = None  # whether items are samples, as the last mini-batch showed
        self._is_replay_known = False  # whether the second pass of a replay was compared with the first
        self._kept_share: Later | None = None  # of the last mini-batch's items
        self._known_divisor: list[bool] = []  # whether a compiled model divides its loss by the number of labels
        self._is_bounded = False  # whether a token with a label in the loss is one with a label in the mini-batch
        self._masses, self._timing = MassHistory(), BackwardTiming()
        self._checks, self._notices, self._trimming_logs = LateChecks(), Notices(), TrimmingLogs()
        super().__init__(*args, **kwargs)

    @property
    def trim(self) -> TrimmingConfig:
        """What is trimmed, and how: the `trim_*` fields of `args` as they are now."""
        return TrimmingConfig.of(self.args)

    def _inner_model(self) -> nn.Module:
        """The model without accelerate's, the compiler's and PEFT's wrappers. To find it takes a millisecond."""
        assert self.model is not None
        if self._inner_cache[0] is not self.model:
            inner = unwrap_peft_model(without_compilation(self.accelerator.unwrap_model(self.model)))
            self._inner_cache = (self.model, inner)
        return self._inner_cache[1]

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
        accelerator = self.accelerator
        return ProcessGroup(
            lambda values: accelerator.gather(values[None]),
            lambda size: host_numbers(size, accelerator),
            self.args.process_index,
            processes,
            accelerator.device,
        )

    # ---- the loss -------------------------------------------------------------------------------------------------

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
        labels = self._labels(inputs)
        remembers = trim.remembers and self._memory is not None
        if not ((trim.trims or remembers) and is_training) or self._batch is not None:
            return compute_loss(model, model_inputs, *args, **kwargs)
        self._has_loss = True
        keep, inner = self.keep_fraction, self._inner_model()
        head = self._chunked_head(trim, inner, keep, labels) if trim.trims else None
        # The first mini-batch has shown what the loss is over.
        is_simple = keep == 1 and self._per_sample is not None and not remembers
        compiled = [] if is_simple and head is None else compiled_modules(model)
        if head is not None and is_compiled_whole(inner, compiled):
            head = None
        if is_simple and head is None:
            result = compute_loss(model, model_inputs, *args, **kwargs)
            if (plain := self._plain_result(trim, result, labels)) is not None:
                self._trimming_logs.add_untrimmed()
                return plain
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
                f"the loss of {type(inner).__name__} was computed. {MARK_LOSSES} trim_select='none' and "
                "trim_memory=False train without trimming."
            )
        self._note(trim, batch, choose(assumed if batch.per_sample is None else batch.per_sample))
        if head is not None and batch.logged is not None:
            self._kept_share = Later(batch.logged[0] / batch.logged[1])
        if batch.process_group is not None and self._number + 1 == len(self._step_inputs):
            for _ in range(self._num_batches - len(self._step_inputs)):  # others have more of them in this step
                batch.join_without_items()
        return result

    def _new_pass(
        self, compute_loss: Callable[..., Any], trim: TrimmingConfig, keep: float, model: nn.Module,
        compiled: list[nn.Module], head: LMHead | None, mode: str, has_outputs: bool, inputs: Any,
    ) -> LossPass:  # fmt: skip
        """The way of a mini-batch to its loss."""
        size = self._batch_size(inputs)
        if isinstance(inputs, Mapping) and compiled and trim.trim_backward in ("auto", "sparse"):
            mark_batch_dynamic(inputs, size)
        batch = TrimmedBatch(
            trim,
            keep,
            size,
            mode == "sparse",
            self._generator(trim),
            self._labels(inputs),
            self._process_group(trim, keep),
            self._masses.means(self.state) if trim.is_adaptive else [],
            self._checks,
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
            self._known_divisor,
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

    @staticmethod
    def _labels(inputs: Any) -> Tensor | None:
        """Labels whose number is that of the losses, but for the first of each text."""
        return inputs.get("shift_labels", inputs.get("labels")) if isinstance(inputs, Mapping) else None

    def _batch_size(self, inputs: Any) -> int:
        """Number B of samples: that of the labels, since a sample may have several images."""
        if isinstance(inputs, Mapping):
            for name in (*self.label_names, "labels"):
                if isinstance(inputs.get(name), Tensor) and inputs[name].dim():
                    return len(inputs[name])
        return find_batch_size(inputs) or 1

    def _plain_result(self, trim: TrimmingConfig, result: Any, labels: Tensor | None) -> Any:
        """
        Where everything is kept: what `compute_loss` returned, unless its loss has to be looked at as any other. It is
        NaN without a label; a GPU finds out by itself whether that is why.
        """
        loss = loss_of(result)
        is_finite = loss.isfinite().all()
        if waiting.reads_freely(loss.device) or trim.trim_nonfinite == "drop":
            return result if is_finite else None
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            is_empty = (labels == IGNORE_INDEX).all()
            loss, is_finite = loss.where(is_finite | ~is_empty, 0), is_finite | is_empty
        self._checks.refuse(~is_finite, f"The loss of this mini-batch is NaN or infinite. {NONFINITE_ADVICE}", True)
        return with_loss(result, loss)

    def _chunked_head(
        self, trim: TrimmingConfig, inner: nn.Module, keep: float, labels: Tensor | None
    ) -> LMHead | None:
        """The language-model head whose logits are computed in chunks, if the model has one that can be."""
        if trim.trim_backward not in ("auto", "sparse") or self.compute_loss_func is not None:
            return None
        if self.label_smoother is not None or self.is_fsdp_enabled or self._fused_loss() is not None:
            return None  # TRL's `SFTTrainer` has chunks of its own
        module = find_lm_head(inner)
        if module is None:
            return None
        num_labels = None
        if self._is_bounded and labels is not None and not waiting.reads_freely(labels.device):
            num_labels = Later(labels.ne(IGNORE_INDEX).sum())
        share = self._kept_share if trim.is_adaptive else None  # it is at most p
        return LMHead(module.weight, keep if share is None else min(keep, share.read()), num_labels)

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
        """What the mini-batch has shown: log each choice once, and what the user should know."""
        if self._batches is not None:
            self._batches.append(batch)
            self._remember(batch, self._number)
        self._trimming_logs.add(batch)
        if self._per_sample is None:
            self._is_bounded = batch.is_bounded_by_labels
        self._per_sample = batch.per_sample
        if not batch.keeps_all:
            mode, reason = choice
            if trim.trim_strict and mode != "sparse":
                raise ValueError(
                    f"trim_strict=True, and the backward pass would be {mode}: {reason}. Set it to False."
                )
            self._notices.tell_backward(mode, reason)
        self._notices.tell_batch(batch)
