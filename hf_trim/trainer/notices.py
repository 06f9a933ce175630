"""
Between steps 3 and 5 of: batch → per-item losses → keep decision → trimmed backward → logs.

What the user should know of a training, each of it said once. For example, "Trimmed batches use the sparse backward
pass: no module mixes the samples of a batch."
"""

import logging

from transformers import TrainerState, TrainingArguments

from hf_trim.trainer.arguments import TrimmingConfig
from hf_trim.trainer.batch import TrimmedBatch
from hf_trim.trainer.guard import evaluates_worse, unlearns


logger = logging.getLogger(__name__)


class Notices:
    """Warnings in the log, each of them once."""

    def __init__(self):
        self.backward: str | None = None  # the backward pass that was told last
        self.eval_name = "eval"  # what the evaluations are of, if the user knows them by another name
        self._said: set[str] = set()
        self._most_samples = 0  # of the mini-batches so far

    def say(self, message: str, *values: object) -> None:
        """
        Log a warning, unless it was logged before.

        Args:
            message (`str`): The message, with places for values.
            values: The values.
        """
        if message not in self._said:
            self._said.add(message)
            logger.warning(message, *values)

    def tell_backward(self, mode: str, reason: str) -> None:
        """
        Tell which backward pass trimmed mini-batches use, again only where it is another one.

        Args:
            mode (`str`): `"dense"`, `"sparse"` or `"replay"`.
            reason (`str`): Why; a pass that was asked for is not mentioned.
        """
        if mode != self.backward and reason != "asked for":
            logger.warning("Trimmed batches use the %s backward pass: %s.", mode, reason)
            self.backward = mode

    def tell_batch(self, batch: TrimmedBatch) -> None:
        """
        Tell what a mini-batch has shown.

        Args:
            batch ([`~hf_trim.trainer.batch.TrimmedBatch`]): The mini-batch.
        """
        self._most_samples = max(self._most_samples, batch.batch_size)
        if batch.keeps_all:
            return
        is_whole = batch.batch_size == self._most_samples  # the last one of an epoch may have fewer
        if batch.dropped:
            self.say(
                "%d samples of a mini-batch have losses that are NaN or infinite, and were dropped. Later samples of "
                "this kind are dropped without a message.", batch.dropped,
            )  # fmt: skip
        if batch.has_unknown_weights:
            self.say("A replay ranks the samples by the plain sum of the losses in the model's forward pass.")
        skip = batch.config.trim_skip_hardest
        if skip and round(skip * batch.most_items) == 0 and is_whole:
            self.say(
                f"trim_skip_hardest={skip} skips none of the {batch.most_items} items of a mini-batch. Raise it, or "
                "per_device_train_batch_size."
            )
        if batch.most_items <= 1 < batch.batch_size:
            self.say(
                "Each call of a loss function has a single item to choose from, which is kept whatever p is: nothing "
                "is trimmed. Compute the losses of all samples in one call, or mark them with hf_trim.mark_losses."
            )
        elif batch.most_items <= 1 and is_whole:
            self.say(
                "A mini-batch has a single item to choose from, which is kept whatever p is: nothing is trimmed. "
                "Raise per_device_train_batch_size (and lower gradient_accumulation_steps); choose among the "
                "accumulated mini-batches with trim_backward='replay' (in one process), or among the processes with "
                "trim_scope='global'; or use trim_unit='token' where there is a loss per token."
            )

    def tell_rest(self, loss: float, rest: float) -> None:
        """
        Tell what of the loss is not trimmed.

        Args:
            loss (`float`): The loss of a mini-batch.
            rest (`float`): What of it does not come from torch's loss functions.
        """
        if abs(rest) > 0.01 * abs(loss):  # less may be rounding
            self.say(
                "Of the loss %.4g, %.4g is no weighted sum of what torch's loss functions returned. What is made by "
                "hand is not trimmed: mark losses with hf_trim.mark_losses before their mean is taken. A function of "
                "means, such as a product, gets their values over the whole mini-batch.", loss, rest,
            )  # fmt: skip

    def tell_harm(self, state: TrainerState, args: TrainingArguments, trim: TrimmingConfig) -> None:
        """
        Tell where the logs show that trimming does harm.

        Args:
            state ([`~transformers.TrainerState`]): Its logs are looked at.
            args ([`~transformers.TrainingArguments`]): Its metric for the best model is looked at, or the loss.
            trim ([`~hf_trim.trainer.arguments.TrimmingConfig`]): What is trimmed.
        """
        history = state.log_history
        name = args.metric_for_best_model or "eval_loss"
        name = name if name.startswith("eval_") else f"eval_{name}"
        greater_is_better = bool(args.greater_is_better) and name != "eval_loss"
        advice = "trim_mass" if trim.is_adaptive else "trim_keep_end, or set trim_schedule='adaptive'"
        message = (
            "The loss over all items (full_loss) has risen from %.4g, when p was %.2f, to %.4g at p = %.2f: the model "
            f"unlearns what is left out, or the learning rate is too high. Raise {advice}."
        )
        # What was said need not be looked for again: the history grows with each log.
        if trim.trim_select == "hardest" and message not in self._said and (rise := unlearns(history)) is not None:
            self.say(message, *rise)
        message = (
            f"{name.replace('eval', self.eval_name, 1)} was %.4g when p was %.2f, and is %.4g at p = %.2f. Compare "
            f"with trim_select='none': if that does better, raise {advice}."
        )
        # The first evaluations say little. In our records 58 of 150 trainings that trimming harmed had one so much
        # worse than the best, and so had 74 of the 605 others, plain ones included; in the second half 51 and 26 had.
        is_late = 2 * state.global_step >= state.max_steps
        if is_late and message not in self._said:
            if (worse := evaluates_worse(history, name, greater_is_better)) is not None:
                self.say(message, *worse)

    def tell_fallbacks(self, fallbacks: dict[str, int]) -> None:
        """
        Tell which operations ran dense.

        Args:
            fallbacks (`dict[str, int]`): Name of the operation → how often.
        """
        if fallbacks:
            counts = ", ".join(f"{name} {count}×" for name, count in fallbacks.items())
            self.say("Operations without a row-sparse rule ran dense: %s. Gradients are the same.", counts)
