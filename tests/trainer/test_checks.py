"""What is refused: settings before training, losses and labels at the first batch."""

import pytest
import torch
import torch.nn.functional as F

from hf_trim import TrimmingArguments, TrimmingTrainer
from tests.support.heads import HEADS, make
from tests.support.helpers import (
    digits,
    tiny_vit,
    train,
)


def refused(match, model, tmp_path, trainer_kwargs=None, **args):
    with pytest.raises(ValueError, match=match):
        TrimmingTrainer(
            model,
            TrimmingArguments(str(tmp_path), use_cpu=True, report_to="none", **args),
            train_dataset=digits(),
            **(trainer_kwargs or {}),
        )


def test_what_is_not_supported_is_refused_at_construction(tmp_path):
    refused("no meaning for regression", tiny_vit("regression"), tmp_path, label_smoothing_factor=0.1)
    liger = {"use_liger_kernel": True}
    refused("use_liger_kernel=True replaces the loss by a fused one", tiny_vit(), tmp_path, **liger)
    half = {**liger, "liger_kernel_config": {"fused_linear_cross_entropy": False}}
    refused("use_liger_kernel=True replaces the loss by a fused one", tiny_vit(), tmp_path, **half)


def test_nothing_is_refused_where_nothing_is_trimmed(tmp_path):
    for arguments in ({"trim_select": "none"}, {"trim_keep_start": 1.0, "trim_keep_end": 1.0}):
        args = TrimmingArguments(
            str(tmp_path), use_cpu=True, report_to="none", label_smoothing_factor=0.1, **arguments
        )
        TrimmingTrainer(tiny_vit("regression"), args, train_dataset=digits())
        train(nothing_to_rank(), digits(), tmp_path, **arguments)


def test_parallelism_that_would_rank_wrongly_is_refused(tmp_path):
    args = TrimmingArguments(str(tmp_path), use_cpu=True, report_to="none")
    args._n_gpu = 2
    with pytest.raises(ValueError, match="DataParallel over 2 GPUs would trim each replica"):
        TrimmingTrainer(tiny_vit(), args, train_dataset=digits())

    class ContextParallel(TrimmingTrainer):
        def get_cp_size(self):
            return 2

    args = TrimmingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="Context or sequence parallelism splits a sample"):
        ContextParallel(tiny_vit(), args, train_dataset=digits())


def nothing_to_rank():
    """Like a head of transformers, but its loss is made by hand."""

    class Focal(type(tiny_vit())):
        def loss_function(self, labels, logits, config, **kwargs):
            losses = F.cross_entropy(logits, labels, reduction="none")
            return ((1 - torch.exp(-losses)) ** 2 * losses).mean()

    return Focal(tiny_vit().config)


def metric_only():
    """Its loss does not depend on the loss function of torch that it calls."""

    class Metric(type(nothing_to_rank())):
        def loss_function(self, labels, logits, config, **kwargs):
            self.metric = F.cross_entropy(logits, labels)
            return super().loss_function(labels, logits, config)

    return Metric(tiny_vit().config)


@pytest.mark.parametrize("keep", [1.0, 0.5])  # in the first mini-batch, although all of it is kept
@pytest.mark.parametrize(
    "make_model, arguments, match",
    [
        (nothing_to_rank, {}, r"found nothing to rank.* loss of Focal .*mark_losses.*compute_loss_func"),
        (metric_only, {}, "The loss does not depend on any call of a loss function of torch"),
        (tiny_vit, {"trim_unit": "token"}, "trim_unit='token' needs a loss per token"),
    ],
    ids=["nothing to rank", "metric only", "token"],
)
def test_a_loss_that_cannot_be_trimmed_is_refused_in_the_first_batch(make_model, arguments, match, keep, tmp_path):
    with pytest.raises(ValueError, match=match):
        train(make_model(), digits(8), tmp_path, trim_keep_start=keep, **arguments)


def test_losses_of_a_wrong_shape_are_refused(tmp_path):
    def losses_of_pairs(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels, reduction="none")[::2]

    with pytest.raises(ValueError, match=r"returned \[4\], where TrimmingTrainer needs .* per label \[8\]"):
        train(tiny_vit(), digits(8), tmp_path, trainer_kwargs={"compute_loss_func": losses_of_pairs})


def test_strict_refuses_a_backward_pass_that_is_not_sparse(tmp_path):
    arguments = {"trim_backward": "sparse", "trim_strict": True, "trim_keep_start": 0.5}
    with pytest.raises(ValueError, match="trim_strict=True, and the backward pass would be dense: tokens of one"):
        train(make("token-classification"), HEADS["token-classification"][1](), tmp_path, **arguments)
