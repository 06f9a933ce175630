"""
Step 2 (per-item losses) of: batch → per-item losses → keep decision → trimmed backward → logs.

The way of a mini-batch through `compute_loss` and the model, and what is done around the model's forward pass, outside
of what is compiled:

- loss functions inside a compiled graph cannot be intercepted, so the loss is computed once more from the logits;
- the second pass of a replay runs the kept samples only. For example, B = 8 samples of which 2 are kept: the model
  gets `[2, ...]` and returns logits `[2, C]`, and the caller gets the `[8, C]` of the first pass with these 2 in them;
- TRL's `SFTTrainer` takes the mean of log-probabilities that its models return.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_trim.backward import waiting
from hf_trim.backward._torch_internals import around_call, tree_map
from hf_trim.backward.compiled.backend import keep_backward_graphs
from hf_trim.backward.replay import rows_of, scoring
from hf_trim.trainer.batch import TrimmedBatch
from hf_trim.trainer.lm_head import LMHead
from hf_trim.trainer.losses import MARK_LOSSES, LossCalls, loss_of, mark_losses, with_loss


REFERENCE_COLUMN = "reference_loss"


def is_compiled_whole(inner: nn.Module, compiled: list[nn.Module]) -> bool:
    """
    Args:
        inner (`torch.nn.Module`): The model, without wrappers.
        compiled (`list[torch.nn.Module]`): The parts of the wrapped model that were compiled.

    Returns:
        `bool`: Whether the whole model was compiled, with its loss.
    """
    return any(inner in set(module.modules()) for module in compiled)


def zero_of(model: nn.Module) -> Tensor:
    """A zero whose gradient is zero for each parameter. Engines such as DDP wait for the gradient of each."""
    return cast(Tensor, sum(p.sum() * 0 for p in model.parameters() if p.requires_grad))


def without_reference(inputs: Any) -> Any:
    """The inputs of the model: without the column that is there for `trim_score` only."""
    if not (isinstance(inputs, Mapping) and REFERENCE_COLUMN in inputs):
        return inputs
    return {name: value for name, value in inputs.items() if name != REFERENCE_COLUMN}


class LossPass:
    """
    The way from a mini-batch to its loss, through `compute_loss` and the model.

    Args:
        compute_loss (`Callable`): The trainer's own `compute_loss`.
        model (`torch.nn.Module`): The model, with its wrappers.
        inner (`torch.nn.Module`): The model without them.
        compiled (`list[torch.nn.Module]`): The parts of the model that were compiled.
        batch ([`~hf_trim.trainer.batch.TrimmedBatch`]): The mini-batch.
        head ([`~hf_trim.trainer.lm_head.LMHead`], *optional*): The layer whose logits are computed in chunks.
        score (`Callable`, *optional*): `f(outputs, inputs, losses)`, what items are ranked by instead of their losses.
        fused_loss (`str`, *optional*): The `loss_type` of TRL's `SFTTrainer`.
        keeps_outputs (`bool`): Whether a replay shall return the outputs of all samples.
        known_divisor (`list[bool]`): Whether a compiled model divides its loss by the number of labels of the step.
            Empty until a mini-batch has shown it.
    """

    def __init__(
        self,
        compute_loss: Callable,
        model: nn.Module,
        inner: nn.Module,
        compiled: list[nn.Module],
        batch: TrimmedBatch,
        head: LMHead | None,
        score: Callable[[Any, Any, Tensor], Tensor] | None,
        fused_loss: str | None,
        keeps_outputs: bool,
        known_divisor: list[bool],
    ):
        self.compute_loss, self.model, self.inner, self.batch = compute_loss, model, inner, batch
        self.score_of, self.fused_loss, self.keeps_outputs = score, fused_loss, keeps_outputs
        self.compiled, self.is_compiled = compiled, is_compiled_whole(inner, compiled)
        self.calls = LossCalls(batch, head)
        self.kept: Tensor | None = None  # in the second pass of a replay
        self.scored: Any = None  # what `compute_loss` returned in the first one
        self.last_outputs: Any = None  # of the model, for `score`
        self.is_left_out = False  # whether other mini-batches of the step were chosen (`step_choice.py`)
        self._outputs: list[Any] = []  # of the first pass
        self._known_divisor = known_divisor

    def score(self, inputs: Any, *args: Any, **kwargs: Any) -> None:
        """The first pass of a replay: choose the samples, without a graph of the model."""
        self.batch.is_scoring = True
        # The model has no graph, but what follows it has.
        with self._explain("scored without a graph"), scoring(self.model), torch.enable_grad():
            self.scored = self._run(copy.copy(inputs), *args, **kwargs)
        self._select(self.scored, inputs)
        self.kept = self.batch.begin_replay()

    def run(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss, with the graph of the trimmed one. Returns what `compute_loss` returns."""
        if self.is_left_out:
            return with_loss(self.scored, self.batch.leave_out(loss_of(self.scored), zero_of(self.model)))
        with self._explain("run on the kept samples alone") if self.kept is not None else nullcontext():
            # A `compute_loss` may take the labels out of its inputs.
            result = self._run(inputs if self.score_of is None else copy.copy(inputs), *args, **kwargs)
        self._select(result, inputs)
        if isinstance(self.batch.overflows, Tensor):  # no gradient is finite: as without trimming, the step is skipped
            loss = loss_of(result)
            return with_loss(result, loss * torch.ones_like(loss).masked_fill(self.batch.overflows > 0, torch.nan))
        # Not even a gradient of zero may go into a model with activations that are not finite.
        return with_loss(result, zero_of(self.model)) if self.batch.has_no_graph else result

    def _select(self, result: Any, inputs: Any) -> None:
        """Choose the items to keep, once the loss is known."""
        if self.score_of is not None:
            try:
                self.batch.rank_by(partial(self.score_of, self.last_outputs, inputs))
            except KeyError as error:
                raise ValueError(
                    f"trim_score looks for {error}, and the mini-batch has {', '.join(map(str, inputs))}: add the "
                    "column to the data set. Columns that the model does not take are removed, but for "
                    f"{REFERENCE_COLUMN}, unless remove_unused_columns=False."
                ) from error
        self.last_outputs = None
        self.batch.select(loss_of(result))

    @staticmethod
    @contextmanager
    def _explain(what: str) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"This model, or its compute_loss, cannot be {what}, as trim_backward='replay' does: {error} Set "
                "trim_backward='sparse'."
            ) from error

    def check_replay(self, result: Any) -> None:
        """
        Compare the second pass of a replay with the first.

        Args:
            result: What [`run`] returned.

        Raises:
            `ValueError`: If the losses differ: the model's depends on the number of samples, or on other samples.
        """
        if self.kept is None or self.is_left_out or self.batch.has_no_graph:
            return
        first, second = float(loss_of(self.scored).detach()), float(loss_of(result).detach())
        if abs(second - first) > 0.05 * abs(first):
            raise ValueError(
                f"With the kept samples alone the loss is {second:.4g}, and it was {first:.4g} with all of them: it "
                "depends on their number, or on other samples. Set trim_backward='sparse'."
            )

    def _run(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for module in self.compiled:
                stack.enter_context(around_call(module, self.calls.let_alone))
            if self.compiled and self.batch.config.trim_backward in ("auto", "sparse"):
                stack.enter_context(keep_backward_graphs())
            stack.enter_context(around_call(self.model, self._call_model))
            stack.enter_context(self.calls)
            inputs = inputs if self.score_of is None else without_reference(inputs)
            return self.compute_loss(self.model, inputs, *args, **kwargs)

    def _call_model(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass, and what is done around it."""
        batch = self.batch
        if not torch.is_grad_enabled():  # a teacher's, or for a metric
            return forward(*args, **kwargs)
        if self.kept is not None:
            args, kwargs = rows_of((args, kwargs), self.kept, batch.batch_size)
        first, batch.is_in_model = batch.num_calls, batch.is_scoring or self.kept is not None
        with torch.no_grad() if batch.is_scoring else nullcontext():
            outputs = self._run_compiled(forward, *args, **kwargs) if self.is_compiled else forward(*args, **kwargs)
        batch.is_in_model = False
        if batch.is_scoring and batch.num_calls > first:
            outputs = self._with_loss(outputs, lambda loss: batch.add_model_loss(loss, first))
        if self.keeps_outputs and batch.is_scoring:
            self._outputs.append(outputs)
        elif self.keeps_outputs and self.kept is not None and self._outputs:
            outputs = self._outputs_of_all(self._outputs.pop(0), outputs)
        if self.fused_loss is not None and getattr(outputs, "log_probs", None) is not None:
            outputs = self._mark_log_probs(outputs)
        if self.score_of is not None:
            self.last_outputs = outputs
        return outputs

    @staticmethod
    def _with_loss(outputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
        """The outputs with another loss, which is their first one or has a name."""
        if isinstance(outputs, Mapping):
            if isinstance(outputs.get("loss"), Tensor):
                cast(Any, outputs)["loss"] = change(outputs["loss"])
            return outputs
        if isinstance(outputs, (tuple, list)) and outputs and isinstance(outputs[0], Tensor) and not outputs[0].dim():
            return (change(outputs[0]), *outputs[1:])
        return change(outputs) if isinstance(outputs, Tensor) and not outputs.dim() else outputs

    def _outputs_of_all(self, scored: Any, outputs: Any) -> Any:
        """The outputs of the first pass, with those of the kept samples, and their graph, in their places."""
        assert self.kept is not None
        kept = self.kept

        def put(whole: Any, part: Any) -> Any:
            if not isinstance(part, Tensor) or not isinstance(whole, Tensor) or part.shape == whole.shape:
                return part
            if part.dim() == 0 or part.shape[1:] != whole.shape[1:] or len(part) != len(kept):
                return part
            return whole.to(part.dtype).index_copy(0, kept.to(part.device), part)

        return tree_map(put, scored, outputs)

    def _mark_log_probs(self, outputs: Any) -> Any:
        """`SFTTrainer` sums up log-probabilities `[B, T − 1]` and divides the sum by the number of tokens."""
        losses = -outputs.log_probs
        # "dft" multiplies each by its probability.
        scores = losses * (-losses).exp() if self.fused_loss == "dft" else None
        marked = -mark_losses(losses, outputs.label_mask.to(losses), scores=scores)
        return type(outputs)(**{**outputs, "log_probs": marked})

    # ---- compiled models ------------------------------------------------------------------------------------------

    def _run_compiled(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        config = getattr(self.inner, "config", None)
        returns_tuple = config is not None and not kwargs.get("return_dict", getattr(config, "return_dict", True))
        if returns_tuple:  # without names it would not be known which output is which
            kwargs["return_dict"] = True
        outputs = forward(*args, **kwargs)
        if self.batch.is_recording and isinstance(outputs, Mapping) and isinstance(outputs.get("loss"), Tensor):
            cast(Any, outputs)["loss"] = self._recompute_loss(kwargs, outputs)
        return cast(Any, outputs).to_tuple() if returns_tuple else outputs

    def _recompute_loss(self, inputs: Mapping, outputs: Mapping) -> Tensor:
        """
        Compute the loss of a compiled model from its outputs.

        Raises:
            `ValueError`: If the model's loss function needs what is not there, or gives another loss.
        """
        model, batch = self.inner, self.batch
        loss_function: Callable[..., Any] | None = getattr(model, "loss_function", None)
        if loss_function is None:
            raise ValueError(
                f"The loss of {type(model).__name__} is inside its compiled graph, where it cannot be trimmed: "
                f"compile the part of the model without the loss, or compute it in compute_loss_func. {MARK_LOSSES}"
            )
        arguments = {**inputs, **outputs, "config": model.config, "pooled_logits": outputs.get("logits")}
        if outputs.get("logits") is not None:
            arguments["vocab_size"] = outputs["logits"].shape[-1]
        num_items = arguments.pop("num_items_in_batch", None)
        names = inspect.signature(loss_function).parameters
        arguments = {name: arguments[name] for name in names if name in arguments}
        # Not every model divides its loss by the number of labels of the step: the returned loss tells.
        num_calls, returned = batch.num_calls, outputs["loss"].mean()
        for has_divisor in dict.fromkeys((*self._known_divisor, True, False)):
            divisor = {"num_items_in_batch": num_items} if has_divisor else {}
            try:
                loss = loss_function(**arguments, **divisor)
            except TypeError as error:
                raise ValueError(f"The loss of compiled {type(model).__name__} is not known: {error}.") from None
            # In a replay, the first pass has compared it; in the second, it has the value of all samples.
            if self._known_divisor and (self.kept is not None or not waiting.reads_freely(loss.device)):
                return loss
            if batch.checks.skips_nonfinite and not returned.isfinite():
                return loss  # there will be no step
            if abs(loss.item() - returned.item()) <= 1e-3 + 0.01 * abs(returned.item()):
                self._known_divisor[:] = [has_divisor]
                return loss
            batch.forget_calls(num_calls)
        raise ValueError(
            f"The compiled {type(model).__name__} returned the loss {returned.item():.6g}, and its loss function "
            f"gives {loss.item():.6g} for its logits. Do not compile it, or pass compute_loss_func. {MARK_LOSSES}"
        )
