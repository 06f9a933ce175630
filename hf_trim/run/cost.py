"""
What a training cost: samples that passed forward and backward through the model. Other work on the machine does not
change that, as it changes seconds.

e.g. 1,000 samples, 10 epochs, 60 % of each mini-batch kept: 10,000 forward and 6,000 backward passes, where plain
training has 10,000 of each. A backward pass costs about two forward ones, so that this is 22,000 / 30,000 = 73 %.
"""

from typing import cast

from hf_trim.backward.choice import find_mixing_modules
from hf_trim.run.trainer import RecipeTrainer
from hf_trim.trainer.arguments import TrimmingArguments


def count_passes(trainer: RecipeTrainer, is_language: bool) -> dict[str, int]:
    """
    Count the passes of a finished training. The backward pass is counted as the shortest exact one: it has the kept
    samples, or all of them where single tokens are kept, where batch normalization mixes the samples, or with
    `trim_backward="dense"`. With `trim_scope="dataset"` what is left out has no forward pass either.

    Args:
        trainer ([`RecipeTrainer`]): The trainer, after its training.
        is_language (`bool`): Whether losses are those of tokens.

    Returns:
        `dict[str, int]`: `forward_passes` and `backward_passes`, in samples.
    """
    args = cast(TrimmingArguments, trainer.args)
    model = trainer.accelerator.unwrap_model(trainer.model)
    drawn = trainer.count_samples()
    keeps_tokens = is_language and args.trim_unit != "sample"
    was_training = model.training
    mixes = bool(find_mixing_modules(model.train()))
    model.train(was_training)
    if not args.trims or keeps_tokens or mixes or args.trim_backward == "dense":
        return {"forward_passes": drawn, "backward_passes": drawn}
    kept = round(drawn * _kept_fraction(trainer.state.log_history))
    repeated = kept if args.trim_backward == "replay" else 0
    return {"forward_passes": drawn + repeated, "backward_passes": kept}


def _kept_fraction(log_history: list[dict]) -> float:
    """The mean over all steps of what was kept. Each log has the mean since the last one."""
    total, last = 0.0, 0
    for log in log_history:
        if "kept_fraction" in log:
            total += log["kept_fraction"] * (log["step"] - last)
            last = log["step"]
    return total / last if last else 1.0
