"""Tiny models and real data that the tests share."""

from functools import cache

import torch
from sklearn.datasets import load_digits
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)

from hf_trim import TrimmingArguments, TrimmingTrainer


read_digits = cache(load_digits)  # a text file


def digits(n=48, task="single"):
    """scikit-learn's digits as `pixel_values` [1, 8, 8] in [0, 1], with labels for one of the three problem types."""
    data = read_digits()
    rows = []
    for image, digit in zip(data.images[:n], data.target[:n], strict=True):
        label = {
            "single": int(digit),
            "multi": [float(digit % 2), float(digit > 4), float(digit % 3 == 0)],
            "regression": float(digit) / 10,
        }[task]
        rows.append({"pixel_values": torch.tensor(image / 16.0, dtype=torch.float32)[None], "labels": label})
    return rows


def digit_texts(n=48, task="single", length=10):
    """The same data as token ids: the brightness of the rows' pixels, padded to different lengths."""
    rows = []
    for row in digits(n, task):
        tokens = 1 + (row["pixel_values"].flatten()[:length] * 16).long()
        used = 4 + int(tokens.sum()) % (length - 4)
        mask = torch.zeros(length, dtype=torch.long)
        mask[:used] = 1
        rows.append({"input_ids": tokens * mask, "attention_mask": mask, "labels": row["labels"]})
    return rows


LABELS = {"single": 10, "multi": 3, "regression": 1}


def tiny_vit(task="single", dropout=0.0, seed=0):
    set_seed(seed)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8,
            patch_size=4, num_channels=1, num_labels=LABELS[task], hidden_dropout_prob=dropout,
        )
    )  # fmt: skip


def tiny_bert(task="single", dropout=0.1, seed=0, **overrides):
    set_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16, num_labels=LABELS[task], hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout, **overrides,
        )
    )  # fmt: skip


def tiny_resnet(task="single", seed=0):
    set_seed(seed)
    return TimmWrapperForImageClassification(
        TimmWrapperConfig(
            architecture="resnet10t", num_labels=LABELS[task], model_args={"in_chans": 1}, do_pooling=True
        )
    )


class InOrder(TrimmingTrainer):
    """Takes the data in order: mini-batch i goes to process i modulo their number."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class InOrderAndLarger(InOrder):
    """Multiplies the loss by 2, as `Trainer` does in two processes if it believes that the head counts the labels."""

    processes = 2

    def compute_loss(self, *args, **kwargs):
        result = super().compute_loss(*args, **kwargs)
        return (result[0] * self.processes, *result[1:]) if isinstance(result, tuple) else result * self.processes


class Losses(TrainerCallback):
    """Records the logged training losses, in full precision."""

    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def train(
    model,
    rows,
    output_dir,
    *,
    trainer_cls=TrimmingTrainer,
    args_cls=TrimmingArguments,
    collator=default_data_collator,
    resume=None,
    callbacks=(),
    trainer_kwargs=None,
    **args,
):
    """
    Train with SGD for two epochs of mini-batches of 8 unless told otherwise, logging each step. The trainer comes back
    with `losses` (as logged, but not rounded) and `batches` (all that it saw, in order).
    """
    defaults = {
        "num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 0.1, "optim": "sgd",
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "seed": 3,
        "disable_tqdm": True, "report_to": "none", "remove_unused_columns": False,
    }  # fmt: skip
    if trainer_cls is Trainer:
        args = {name: value for name, value in args.items() if not name.startswith("trim_")}
    recorder, batches = Losses(), []
    trainer = trainer_cls(
        model=model,
        args=args_cls(str(output_dir), **{**defaults, **args}),
        train_dataset=rows,
        callbacks=[recorder, *callbacks],
        **({} if collator is None else {"data_collator": collator}),
        **(trainer_kwargs or {}),
    )
    collator = trainer.data_collator  # the trainer's own, if none was given

    def collate(rows):
        batches.append(collator(rows))
        return batches[-1]

    trainer.data_collator = collate
    trainer.train(resume_from_checkpoint=resume)
    trainer.losses, trainer.batches = recorder.losses, batches
    return trainer


def descend(model, steps, loss_of):
    """Plain gradient descent as `train` does it; returns the losses, one for each of `steps`."""
    optimizer, logged = torch.optim.SGD(model.parameters(), lr=0.1), []
    model.train()
    for step in steps:
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad()
        logged.append(loss.item())
    return logged


def grouped(batches, epochs, accumulate):
    """A flat list of mini-batches as epochs of optimizer steps of `accumulate` mini-batches."""
    per_epoch = len(batches) // epochs
    epochs = [batches[i : i + per_epoch] for i in range(0, len(batches), per_epoch)]
    return [[epoch[i : i + accumulate] for i in range(0, per_epoch, accumulate)] for epoch in epochs]


def reference_loop(model, batches, fractions, loss_func, share=lambda batch, step: 1.0):
    """
    Mini-batch trimming as the paper has it, in plain PyTorch: `batches[epoch][step]` is a list of mini-batches, each
    of which counts for its share. (Plain `Trainer` adds up the mini-batches of a step for heads that take the number
    of labels, as if they had divided by it.)
    """

    def loss_of(step):
        fraction, batches = step
        loss = 0.0
        for batch in batches:
            losses = loss_func(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])
            losses = losses[batch["labels"] != -100] if batch["labels"].dtype == torch.long else losses
            kept = torch.topk(losses, max(1, round(fraction * len(losses)))).values
            loss = loss + kept.mean() * share(batch, batches)
        return loss

    steps = [(fraction, step) for epoch, fraction in zip(batches, fractions, strict=True) for step in epoch]
    return descend(model, steps, loss_of)


def weights(trainer_or_model):
    model = trainer_or_model.model if isinstance(trainer_or_model, Trainer) else trainer_or_model
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def relative_difference(a, b):
    return float((a - b).norm() / b.norm())


def record(arm, seed, error, seconds=10.0, recipe="tiny", **settings):
    """A record of a run, as a comparison writes it."""
    history = [{"epoch": 1.0, "test_error": error + 1, "keep_fraction": 1.0, "train_seconds": seconds / 2},
               {"epoch": 2.0, "test_error": error, "train_seconds": seconds}]  # fmt: skip
    return {"recipe": recipe, "arm": arm, "seed": seed, "metric": "error", "test_error": error,
            "train_seconds": seconds, "history": history, "settings": settings}  # fmt: skip
