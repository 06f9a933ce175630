"""TrimmingTrainer against plain Trainer (p = 1) and against plain PyTorch loops (p < 1), on real data."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForTokenClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_trim import TrimmingTrainer
from tests.support.helpers import (
    descend,
    digit_texts,
    digits,
    grouped,
    reference_loop,
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


LOSSES = {
    "single": lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"),
    "multi": lambda logits, labels: F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1),
    "regression": lambda logits, labels: (logits[:, 0] - labels) ** 2,
}


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
    # Of these heads, this one alone divides by the number of labels of the step.
    share = {"share": share_of_labels} if task == "single" and make_model is tiny_vit else {}
    logged = reference_loop(reference, batches, [1.0, 0.6, 0.2], LOSSES[task], **share)
    assert ours.losses == pytest.approx(logged, rel=1e-4)
    start = weights(make_model(task, dropout=0.0, seed=1))
    assert relative_difference(weights(ours) - start, weights(reference) - start) < 1e-4


def test_accumulating_single_samples_trims_nothing_and_says_so(tmp_path, caplog):
    arguments = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    single = train(tiny_vit(), digits(), tmp_path, trim_keep_start=0.5, **arguments)
    plain = train(tiny_vit(), digits(), tmp_path, trainer_cls=Trainer, **arguments)
    assert single.losses == pytest.approx(plain.losses, rel=1e-6)
    assert relative_difference(weights(single), weights(plain)) < 1e-6
    assert caplog.text.count("A mini-batch has a single item to choose from") == 1


def test_a_last_mini_batch_of_one_sample_is_no_reason_for_advice(tmp_path, caplog):
    train(tiny_vit(), digits(9), tmp_path, trim_keep_start=0.5, per_device_train_batch_size=4, trim_skip_hardest=0.2)
    assert "single item" not in caplog.text and "skips none" not in caplog.text


@pytest.mark.parametrize("select", ["hardest", "random"])
def test_a_replay_chooses_among_accumulated_single_samples(select, tmp_path, caplog):
    arguments = {"trim_keep_start": 0.5, "trim_keep_end": 0.3, "trim_select": select}
    rows = digits(45)  # the last optimizer step is short
    rows[9]["labels"] = rows[10]["labels"] = -100
    single = train(
        tiny_vit(), rows, tmp_path, trim_backward="replay", per_device_train_batch_size=1,
        gradient_accumulation_steps=8, **arguments,
    )  # fmt: skip
    assert "A mini-batch has a single item" not in caplog.text
    whole = train(tiny_vit(), rows, tmp_path, trim_backward="dense", **arguments)
    names = ["kept_fraction", "full_loss"] + ["trim_threshold"] * (select == "hardest")
    if select == "hardest":  # other random numbers are drawn for other mini-batches
        assert single.losses == pytest.approx(whole.losses, rel=1e-5)
        assert relative_difference(weights(single) - weights(tiny_vit()), weights(whole) - weights(tiny_vit())) < 1e-5
    for ours, theirs in zip(single.state.log_history[:1], whole.state.log_history[:1], strict=True):
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-5)


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


def test_a_compute_loss_that_is_set_later_is_trimmed(tmp_path):
    def weighted(model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return F.cross_entropy(model(**inputs).logits, labels, weight=CLASS_WEIGHTS)

    class Late(TrimmingTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.compute_loss = weighted

    class Own(TrimmingTrainer):
        compute_loss = staticmethod(weighted)

    late, own = (train(tiny_vit(), digits(), tmp_path, trainer_cls=x, trim_keep_start=0.5) for x in (Late, Own))
    assert late.losses == own.losses and late.state.log_history[0]["kept_fraction"] == 0.5
    assert torch.equal(weights(late), weights(own))


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
        logged = reference_loop(make_model(), batches, [0.3, 0.3], reference_loss, share_of_labels)
    assert ours.losses == pytest.approx(logged, rel=1e-4)


def share_of_labels(batch, step):
    return (batch["labels"] != -100).sum() / sum((batch["labels"] != -100).sum() for batch in step)


def reference_loop_per_sample(model, batches, loss_func):
    """Of the samples with the highest mean losses all tokens; mini-batches count as they have tokens."""

    def loss_of(step):
        loss = 0.0
        for batch in step:
            losses = loss_func(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"])
            valid = batch["labels"] != -100
            kept = torch.topk(losses.sum(1) / valid.sum(1), max(1, round(0.3 * len(losses)))).indices
            loss = loss + losses[kept].sum() / valid[kept].sum() * share_of_labels(batch, step)
        return loss

    return descend(model, [step for epoch in batches for step in epoch], loss_of)


def test_peft_model_trains_trimmed(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_bert(), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    before = weights(model).clone()
    trainer = train(model, digit_texts(), tmp_path, trim_keep_start=0.5)
    assert trainer.state.log_history[0]["kept_fraction"] == 0.5
    assert not torch.equal(weights(model), before)


def test_a_batch_without_valid_items_leaves_the_weights_alone(tmp_path):
    rows = [{**row, "labels": -100} for row in digits(8)]
    trainer = train(tiny_vit(), rows, tmp_path, num_train_epochs=1, trim_keep_start=0.5)
    assert trainer.losses == [0.0]
    assert torch.equal(weights(trainer), weights(tiny_vit()))
