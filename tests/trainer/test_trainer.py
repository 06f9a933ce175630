"""TrimmingTrainer against plain Trainer (p = 1) and against plain PyTorch loops (p < 1), on real data."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    Trainer,
    TrainingArguments,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    set_seed,
)

from hf_trim import TrimmingArguments, TrimmingTrainer
from tests.support.helpers import (
    descend,
    digit_texts,
    digits,
    relative_difference,
    tiny_bert,
    tiny_resnet,
    tiny_vit,
    train,
    weights,
)


HEADS = {
    "bert-single": (lambda: tiny_bert("single"), lambda: digit_texts(task="single")),
    "bert-multi": (lambda: tiny_bert("multi"), lambda: digit_texts(task="multi")),
    "bert-regression": (lambda: tiny_bert("regression"), lambda: digit_texts(task="regression")),
    "vit-single": (lambda: tiny_vit("single", dropout=0.1), lambda: digits(task="single")),
    "vit-multi": (lambda: tiny_vit("multi"), lambda: digits(task="multi")),
    "timm-resnet": (lambda: tiny_resnet("single"), lambda: digits(task="single")),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"trim_keep_start": 1.0, "trim_keep_end": 1.0},
        {"trim_select": "none"},
        {"trim_select": "none", "gradient_accumulation_steps": 4, "num_train_epochs": 1},
    ],
    ids=["p=1", "none", "none-accumulated"],
)
def test_without_trimming_equals_plain_trainer(head, arguments, tmp_path):
    make_model, make_rows = HEADS[head]
    plain = train(make_model(), make_rows(), tmp_path, trainer_cls=Trainer, **arguments)
    ours = train(make_model(), make_rows(), tmp_path, **arguments)
    assert ours.losses == plain.losses
    assert torch.equal(weights(ours), weights(plain))
    assert not torch.equal(weights(ours), weights(make_model()))


@pytest.mark.parametrize("head", HEADS)
def test_first_epoch_of_a_trimmed_run_equals_plain_trainer(head, tmp_path):
    # p = 1 in the first epoch, through the trimming code this time.
    make_model, make_rows = HEADS[head]
    plain = train(make_model(), make_rows(), tmp_path, trainer_cls=Trainer)
    ours = train(make_model(), make_rows(), tmp_path)
    steps = len(plain.losses) // 2
    assert ours.losses[:steps] == pytest.approx(plain.losses[:steps], rel=1e-5)
    assert ours.losses[steps:] != pytest.approx(plain.losses[steps:], rel=1e-2)


def test_label_smoothing_equals_plain_trainer(tmp_path):
    smoothing = {"label_smoothing_factor": 0.1}
    plain = train(tiny_bert(), digit_texts(), tmp_path, trainer_cls=Trainer, **smoothing)
    untrimmed = train(tiny_bert(), digit_texts(), tmp_path, trim_select="none", **smoothing)
    trimmed = train(tiny_bert(), digit_texts(), tmp_path, **smoothing)
    assert untrimmed.losses == plain.losses
    assert trimmed.losses[:6] == pytest.approx(plain.losses[:6], rel=1e-5)


def reference_loop(model, batches, fractions, loss_func):
    """Mini-batch trimming as the paper has it, in plain PyTorch: `batches[epoch][step]` is a list of mini-batches."""

    def loss_of(step):
        fraction, batches = step
        kept = []
        for batch in batches:
            losses = loss_func(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])
            losses = losses[batch["labels"] != -100] if batch["labels"].dtype == torch.long else losses
            kept.append(torch.topk(losses, max(1, round(fraction * len(losses)))).values)
        return torch.cat(kept).mean()

    steps = [(fraction, step) for epoch, fraction in zip(batches, fractions, strict=True) for step in epoch]
    return descend(model, steps, loss_of)


LOSSES = {
    "single": lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"),
    "multi": lambda logits, labels: F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1),
    "regression": lambda logits, labels: (logits[:, 0] - labels) ** 2,
}


def grouped(batches, epochs, accumulate):
    """A flat list of mini-batches as epochs of optimizer steps of `accumulate` mini-batches."""
    per_epoch = len(batches) // epochs
    epochs = [batches[i : i + per_epoch] for i in range(0, len(batches), per_epoch)]
    return [[epoch[i : i + accumulate] for i in range(0, per_epoch, accumulate)] for epoch in epochs]


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("task", LOSSES)
@pytest.mark.parametrize("make_model, make_rows", [(tiny_bert, digit_texts), (tiny_vit, digits)], ids=["bert", "vit"])
def test_trimming_follows_the_reference_loop(make_model, make_rows, task, accumulate, tmp_path):
    # 43 rows: the last mini-batch is short, and so is the last group of accumulated ones.
    rows, epochs = make_rows(43, task), 3
    if task == "single":
        rows[5]["labels"] = rows[6]["labels"] = -100
    arguments = {"num_train_epochs": epochs, "gradient_accumulation_steps": accumulate}
    ours = train(make_model(task, dropout=0.0, seed=1), rows, tmp_path, **arguments)

    reference = make_model(task, dropout=0.0, seed=1)
    batches = grouped(ours.batches, epochs, accumulate)
    logged = reference_loop(reference, batches, [1.0, 0.6, 0.2], LOSSES[task])
    assert ours.losses == pytest.approx(logged, rel=1e-4)
    start = weights(make_model(task, dropout=0.0, seed=1))
    assert relative_difference(weights(ours) - start, weights(reference) - start) < 1e-4


def test_accumulating_single_samples_equals_one_batch(tmp_path):
    # A mini-batch of one sample keeps it whatever p is, so that 8 × 1 is the untrimmed 1 × 8.
    single = train(
        tiny_vit(),
        digits(),
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        trim_keep_start=0.5,
    )
    whole = train(tiny_vit(), digits(), tmp_path, trainer_cls=Trainer)
    assert single.losses == pytest.approx(whole.losses, rel=1e-4)
    assert relative_difference(weights(single), weights(whole)) < 1e-5


def test_plain_training_arguments_have_the_default_schedule(tmp_path):
    args = TrainingArguments(str(tmp_path), num_train_epochs=3, use_cpu=True, disable_tqdm=True, report_to="none")
    trainer = TrimmingTrainer(tiny_vit(), args, train_dataset=digits())
    trainer.train()
    assert trainer.keep_fraction == pytest.approx(0.2)


@pytest.mark.parametrize("model", ["bert", "vit"])
@pytest.mark.parametrize("select", ["hardest", "random"])
def test_resuming_in_the_middle_of_an_epoch_changes_nothing(model, select, tmp_path):
    # ViT's checkpoints have other names than its parameters, BERT's the same.
    make_model, rows = {"bert": (tiny_bert, digit_texts()), "vit": (tiny_vit, digits())}[model]
    arguments = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4, "trim_select": select}
    whole = train(make_model(dropout=0.2), rows, tmp_path, **arguments)
    resumed = train(make_model(dropout=0.2), rows, tmp_path, resume=str(tmp_path / "checkpoint-8"), **arguments)
    history = [log for log in whole.state.log_history if "loss" in log]
    assert history[8]["epoch"] == pytest.approx(1.5)
    assert resumed.losses == whole.losses[8:]
    names = ("keep_fraction", "kept_fraction", "trim_threshold")
    again = [log for log in resumed.state.log_history if "loss" in log]
    assert [[log[name] for name in names] for log in again] == [[log[name] for name in names] for log in history]
    assert torch.equal(weights(resumed), weights(whole))


def test_best_model_is_loaded_whole(tmp_path):
    arguments = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "num_train_epochs": 3,
    }
    rows = digits()
    # The rate is far too high: the first epoch's model is not the last one's.
    trainer = train(tiny_vit(), rows, tmp_path, learning_rate=3.0, trainer_kwargs={"eval_dataset": rows}, **arguments)
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert min(losses) < losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_logged_metrics(tmp_path):
    trimmed = train(tiny_vit(), digits(), tmp_path, num_train_epochs=3, logging_strategy="epoch")
    logs = [log for log in trimmed.state.log_history if "loss" in log]
    assert [log["keep_fraction"] for log in logs] == pytest.approx([1.0, 0.6, 0.2])
    assert [log["kept_fraction"] for log in logs] == pytest.approx([1.0, 5 / 8, 2 / 8])
    assert logs[0]["full_loss"] == pytest.approx(logs[0]["loss"], rel=1e-4)
    for log in logs[1:]:
        assert log["trim_threshold"] < log["loss"] and log["full_loss"] < log["loss"]
    untrimmed = train(tiny_vit(), digits(), tmp_path, trim_select="none")
    for log in untrimmed.state.log_history[:-1]:
        assert log["keep_fraction"] == log["kept_fraction"] == 1.0
        assert log["full_loss"] == pytest.approx(log["loss"], rel=1e-4)


def test_random_control_keeps_as_many_but_others(tmp_path):
    hardest = train(tiny_vit(), digits(), tmp_path, trim_keep_start=0.25, trim_keep_end=0.25)
    rand = train(tiny_vit(), digits(), tmp_path, trim_keep_start=0.25, trim_keep_end=0.25, trim_select="random")
    first, control = hardest.state.log_history[0], rand.state.log_history[0]
    assert control["kept_fraction"] == first["kept_fraction"] == 0.25
    assert control["full_loss"] == first["full_loss"]
    assert control["loss"] < first["loss"]
    again = train(tiny_vit(), digits(), tmp_path, trim_keep_start=0.25, trim_keep_end=0.25, trim_select="random")
    assert again.losses == rand.losses


def test_evaluation_and_prediction_are_never_trimmed(tmp_path):
    rows = digits()
    trimmed = train(tiny_vit(), rows, tmp_path, trim_keep_start=0.2)
    plain = Trainer(trimmed.model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    ours, expected = trimmed.evaluate(rows), plain.evaluate(rows)
    assert ours["eval_loss"] == expected["eval_loss"]
    assert (trimmed.predict(rows).predictions == plain.predict(rows).predictions).all()


CLASS_WEIGHTS = torch.linspace(0.5, 2.0, 10)


def weighted_loss(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, weight=CLASS_WEIGHTS, reduction="none")


def test_class_weights_through_an_unreduced_loss(tmp_path):
    kwargs = {"trainer_kwargs": {"compute_loss_func": weighted_loss}}
    ours = train(tiny_vit(), digits(), tmp_path, trim_keep_start=0.5, trim_keep_end=0.5, **kwargs)
    reference = tiny_vit()
    logged = reference_loop(
        reference,
        grouped(ours.batches, 2, 1),
        [0.5, 0.5],
        lambda logits, labels: F.cross_entropy(logits, labels, weight=CLASS_WEIGHTS, reduction="none"),
    )
    assert ours.losses == pytest.approx(logged, rel=1e-4)
    assert relative_difference(weights(ours), weights(reference)) < 1e-5
    losses = weighted_loss(ours.model(pixel_values=torch.stack([row["pixel_values"] for row in digits()])),
                           torch.tensor([row["labels"] for row in digits()]))  # fmt: skip
    assert ours.evaluate(digits())["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


def token_loss(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits.transpose(1, 2), labels, reduction="none")


@pytest.mark.parametrize("unit", ["token", "sample"])
def test_a_loss_per_label_is_trimmed_per_token_or_per_sample(unit, tmp_path):
    rows = [
        {**row, "labels": torch.where(row["attention_mask"] > 0, row["input_ids"] % 3, -100)} for row in digit_texts()
    ]

    def make_model():
        set_seed(0)
        config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                            intermediate_size=32, max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.0,
                            attention_probs_dropout_prob=0.0)  # fmt: skip
        return BertForTokenClassification(config)

    def reference_loss(logits, labels):
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")

    arguments = {"trim_keep_start": 0.3, "trim_keep_end": 0.3, "gradient_accumulation_steps": 2, "trim_unit": unit}
    ours = train(make_model(), rows, tmp_path, trainer_kwargs={"compute_loss_func": token_loss}, **arguments)
    batches = grouped(ours.batches, 2, 2)
    if unit == "sample":
        logged = reference_loop_per_sample(make_model(), batches, reference_loss)
    else:
        logged = reference_loop(make_model(), batches, [0.3, 0.3], reference_loss)
    assert ours.losses == pytest.approx(logged, rel=1e-4)


def reference_loop_per_sample(model, batches, loss_func):
    """Of the samples with the highest mean losses all tokens; mini-batches count as they have tokens."""

    def loss_of(step):
        loss, tokens = 0.0, sum(int((batch["labels"] != -100).sum()) for batch in step)
        for batch in step:
            losses = loss_func(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"])
            valid = batch["labels"] != -100
            kept = torch.topk(losses.sum(1) / valid.sum(1), max(1, round(0.3 * len(losses)))).indices
            loss = loss + losses[kept].sum() / valid[kept].sum() * valid.sum() / tokens
        return loss

    return descend(model, [step for epoch in batches for step in epoch], loss_of)


def test_peft_model_trains_trimmed(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_bert(), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    before = weights(model).clone()
    trainer = train(model, digit_texts(), tmp_path, trim_keep_start=0.5)
    assert trainer.state.log_history[0]["kept_fraction"] == 0.5
    assert not torch.equal(weights(model), before)


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


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"trim_keep_end": 0.0}, r"trim_keep_end must be a fraction in \(0, 1\], and is 0.0"),
        ({"trim_keep_start": 1.5}, "trim_keep_start must be a fraction"),
        ({"trim_keep_start": "1"}, "trim_keep_start must be a fraction"),
        (
            {"trim_keep_start": 0.3, "trim_keep_end": 0.5},
            "trim_keep_end .0.5. must not be above trim_keep_start .0.3.",
        ),
        ({"trim_schedule": "epochs"}, "Did you mean 'epoch'"),
        ({"trim_select": "hard"}, "trim_select must be one of.*and is 'hard'"),
        ({"trim_unit": "tokens"}, "Did you mean 'token'"),
        ({"trim_backward": "dens"}, "Did you mean 'dense'"),
        ({"trim_nonfinite": "skip"}, "trim_nonfinite must be one of"),
        ({"trim_scope": "node"}, "trim_scope must be one of"),
    ],
)
def test_wrong_arguments_are_refused(arguments, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        TrimmingArguments(str(tmp_path), **arguments)


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


def test_a_batch_without_valid_items_leaves_the_weights_alone(tmp_path):
    rows = [{**row, "labels": -100} for row in digits(8)]
    trainer = train(tiny_vit(), rows, tmp_path, num_train_epochs=1, trim_keep_start=0.5)
    assert trainer.losses == [0.0]
    assert torch.equal(weights(trainer), weights(tiny_vit()))
