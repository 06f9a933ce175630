"""What is refused: settings before training, losses and labels at the first batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    ViTMAEConfig,
    ViTMAEForPreTraining,
    set_seed,
)

from hf_trim import TrimmingArguments, TrimmingTrainer
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
    set_seed(0)
    autoencoder = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8, patch_size=4,
            num_channels=1, decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=1,
        )
    )  # fmt: skip
    refused("does not know the loss of ViTMAEForPreTraining.*It knows.*compute_loss_func", autoencoder, tmp_path)
    refused("does not know the loss of Linear.*compute_loss_func", nn.Linear(2, 2), tmp_path)
    refused("trim_unit='token' needs a loss per token", tiny_vit(), tmp_path, trim_unit="token")
    refused("no meaning for regression", tiny_vit("regression"), tmp_path, label_smoothing_factor=0.1)
    liger = {"use_liger_kernel": True}
    refused("use_liger_kernel=True replaces the loss by a fused one", tiny_vit(), tmp_path, **liger)
    half = {**liger, "liger_kernel_config": {"fused_linear_cross_entropy": False}}
    refused("use_liger_kernel=True replaces the loss by a fused one", tiny_vit(), tmp_path, **half)


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


def test_wrong_losses_and_batches_are_refused_at_the_first_batch(tmp_path):
    def reduced(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels)

    with pytest.raises(ValueError, match=r"returned \[\], where TrimmingTrainer needs one loss per sample \[8\]"):
        train(tiny_vit(), digits(), tmp_path, trainer_kwargs={"compute_loss_func": reduced})

    class FocalForImageClassification(type(tiny_vit())):
        """Named and made like a head of transformers, but with a loss of its own."""

        def loss_function(self, labels, logits, config, **kwargs):
            losses = F.cross_entropy(logits, labels, reduction="none")
            return ((1 - torch.exp(-losses)) ** 2 * losses).mean()

    class FocalMeanForImageClassification(type(tiny_vit())):
        def loss_function(self, labels, logits, config, **kwargs):
            loss = F.cross_entropy(logits, labels)
            return (1 - torch.exp(-loss)) ** 2 * loss

    for head, match in (
        (FocalForImageClassification, "FocalForImageClassification called none of torch's loss functions"),
        (FocalMeanForImageClassification, "no linear function of the means"),
    ):
        set_seed(0)
        with pytest.raises(ValueError, match=match):
            train(head(tiny_vit().config), digits(), tmp_path)
    with pytest.raises(ValueError, match="The batch has no 'labels'"):
        train(tiny_vit(), [{"pixel_values": row["pixel_values"]} for row in digits()], tmp_path)
