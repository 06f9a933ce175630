"""What items are ranked by (`trim_score`), and the hardest that are skipped (`trim_skip_hardest`): against a loop."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from hf_trim import TrimmingArguments, TrimmingTrainer
from hf_trim.trainer.selection import num_kept, without_hardest
from tests.support.heads import make, texts, tokens_or_none
from tests.support.helpers import descend, digits, relative_difference, tiny_vit, train, weights


HALF = {"trim_keep_start": 0.5, "trim_keep_end": 0.5, "num_train_epochs": 1}


def excess(outputs, inputs, losses):
    """RHO-loss (arXiv 2206.07137) and Rho-1 (arXiv 2404.07965): the loss above that of a reference model."""
    return losses - inputs["reference_loss"]


def entropy(outputs, inputs, losses):
    """Uncertainty: the entropy of the prediction, whatever the label."""
    return torch.distributions.Categorical(logits=outputs.logits).entropy()


def reference_losses(rows):
    """A column of losses, which orders the items in another way than the model's."""
    shape = rows[0]["labels"].shape if isinstance(rows[0]["labels"], torch.Tensor) else ()
    torch.manual_seed(5)
    return [{**row, "reference_loss": 3 * torch.rand(shape)} for row in rows]


def kept_mean(losses, scores, valid, count):
    order = scores.masked_fill(~valid, -torch.inf).flatten().sort(descending=True, stable=True).indices[:count]
    return losses.flatten()[order].mean()


@pytest.mark.parametrize("backward", ["auto", "replay"])
@pytest.mark.parametrize("score", [excess, entropy])
def test_samples_are_ranked_by_a_score(score, backward, tmp_path):
    rows = reference_losses(digits(43))
    ours = train(
        tiny_vit(), rows, tmp_path, trainer_kwargs={"trim_score": score}, trim_backward=backward, **HALF
    )  # fmt: skip
    reference = tiny_vit()

    def loss_of(batch):
        outputs = reference(batch["pixel_values"])
        losses = F.cross_entropy(outputs.logits, batch["labels"], reduction="none")
        scores = score(outputs, batch, losses.detach())
        return kept_mean(losses, scores, torch.ones(len(losses), dtype=torch.bool), num_kept(0.5, len(losses)))

    assert ours.losses == pytest.approx(descend(reference, ours.batches, loss_of), rel=1e-5)
    start = weights(tiny_vit())
    assert relative_difference(weights(ours) - start, weights(reference) - start) < 1e-5
    if backward == "auto":
        by_loss = train(tiny_vit(), digits(43), tmp_path, **HALF)
        assert relative_difference(weights(by_loss) - start, weights(ours) - start) > 0.01


@pytest.mark.parametrize("vocabulary", [8, 10**6], ids=["chunked", "whole"])
@pytest.mark.parametrize("score", [excess, entropy])
def test_tokens_are_ranked_by_a_score(score, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_trim.trainer.lm_head.MIN_VOCABULARY", vocabulary)
    rows = reference_losses(texts(tokens_or_none))
    ours = train(make("llama"), rows, tmp_path, trainer_kwargs={"trim_score": score}, **HALF)
    reference = make("llama")

    def loss_of(batch):
        outputs = reference(batch["input_ids"], batch["attention_mask"])
        labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]  # the loss of a token stands at the one before it
        losses = F.cross_entropy(outputs.logits.transpose(1, 2), labels, reduction="none")
        scores = score(outputs, batch, losses.detach())
        return kept_mean(losses, scores, labels != -100, num_kept(0.5, int((labels != -100).sum())))

    assert ours.losses == pytest.approx(descend(reference, ours.batches, loss_of), rel=1e-5)
    start = weights(make("llama"))
    assert relative_difference(weights(ours) - start, weights(reference) - start) < 1e-4


def test_scores_above_zero_are_the_mass(tmp_path):
    rows = reference_losses(digits(8))
    ours = train(
        tiny_vit(), rows, tmp_path, trainer_kwargs={"trim_score": excess}, num_train_epochs=1,
        trim_schedule="adaptive", trim_mass=0.8,
    )  # fmt: skip
    reference = tiny_vit()

    def loss_of(batch):
        losses = F.cross_entropy(reference(batch["pixel_values"]).logits, batch["labels"], reduction="none")
        mass, order = (losses.detach() - batch["reference_loss"]).clamp(min=0).sort(descending=True)
        count = 1 + int((mass.cumsum(0) < 0.8 * mass.sum()).sum())
        assert count < len(losses)
        return losses[order[:count]].sum() / len(losses)

    assert ours.losses == pytest.approx(descend(reference, ours.batches, loss_of), rel=1e-5)


def test_a_column_of_reference_losses_is_enough(tmp_path):
    """It is not removed as unused, does not reach the model, and may stand in the evaluation's data or not."""
    rows = Dataset.from_list(
        [{**row, "pixel_values": row["pixel_values"].tolist(), "reference_loss": i / 40, "text": "unused"}
         for i, row in enumerate(digits(40))]
    )  # fmt: skip
    seen = []

    def score(outputs, inputs, losses):
        seen.append(sorted(inputs))
        return losses - inputs["reference_loss"]

    args = TrimmingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=8, use_cpu=True, report_to="none",
        eval_strategy="epoch", save_strategy="no", label_smoothing_factor=0.1,
    )  # fmt: skip
    trainer = TrimmingTrainer(tiny_vit(), args, train_dataset=rows, eval_dataset=rows, trim_score=score)
    trainer.train()
    assert set(map(tuple, seen)) == {("labels", "pixel_values", "reference_loss")} and len(seen) == 5
    assert trainer.evaluate(rows.remove_columns("reference_loss"))["eval_loss"] > 0
    assert trainer.predict(rows.remove_columns("labels")).predictions.shape == (40, 10)


@pytest.mark.parametrize(
    "score, match",
    [
        (lambda outputs, inputs, losses: losses.mean(), r"one score for each of the losses \[8\], and returned \[\]"),
        (lambda outputs, inputs, losses: None, "and returned NoneType"),
        (lambda outputs, inputs, losses: losses / 0 - losses / 0, "returned 8 scores that are NaN or infinite"),
    ],
)
def test_scores_that_cannot_rank_are_refused(score, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        train(tiny_vit(), digits(), tmp_path, trainer_kwargs={"trim_score": score}, **HALF)


def test_of_scores_below_zero_the_highest_is_kept(tmp_path):
    """None of them is mass, and which is the hardest counts all the same."""
    kept = train(
        tiny_vit(), digits(8), tmp_path, trainer_kwargs={"trim_score": lambda outputs, inputs, losses: -losses - 5},
        trim_schedule="adaptive", num_train_epochs=1,
    )  # fmt: skip
    losses = F.cross_entropy(
        tiny_vit()(kept.batches[0]["pixel_values"]).logits, kept.batches[0]["labels"], reduction="none"
    )
    assert kept.state.log_history[0]["trim_threshold"] == pytest.approx(-float(losses.min()) - 5)
    assert kept.losses == pytest.approx([float(losses.min()) / 8])


def test_a_missing_column_is_named_and_a_function_may_change_its_losses(tmp_path):
    with pytest.raises(ValueError, match="trim_score looks for 'reference_loss', and the mini-batch has pixel_values"):
        train(tiny_vit(), digits(), tmp_path, trainer_kwargs={"trim_score": excess}, **HALF)
    ours = train(
        tiny_vit(), digits(), tmp_path, trainer_kwargs={"trim_score": lambda outputs, inputs, x: x.mul_(2)}, **HALF
    )
    assert ours.losses == train(tiny_vit(), digits(), tmp_path, **HALF).losses


def test_a_score_without_effect_is_refused(tmp_path):
    for score, select, match in ((excess, "random", "no effect"), ("loss", "hardest", "must be a function")):
        with pytest.raises(ValueError, match=match):
            train(tiny_vit(), digits(), tmp_path, trainer_kwargs={"trim_score": score}, trim_select=select)


def test_texts_may_have_a_score_each(tmp_path):
    score = lambda outputs, inputs, losses: inputs["attention_mask"].sum(1).float()  # noqa: E731
    kwargs = {"trainer_kwargs": {"trim_score": score}, **HALF}
    rows = texts(tokens_or_none)
    with pytest.raises(ValueError, match="or use trim_unit='sample'"):
        train(make("llama"), rows, tmp_path, trim_unit="token", **kwargs)
    ours = train(make("llama"), rows, tmp_path, trim_unit="sample", **kwargs)
    reference = make("llama")

    def loss_of(batch):
        longest = batch["attention_mask"].sum(1).sort(descending=True, stable=True).indices
        kept = longest[: num_kept(0.5, len(longest))]
        logits = reference(batch["input_ids"], batch["attention_mask"]).logits[kept, :-1]
        return F.cross_entropy(logits.transpose(1, 2), batch["labels"][kept, 1:])

    assert ours.losses == pytest.approx(descend(reference, ours.batches, loss_of), rel=1e-5)


# ---- the hardest items are skipped ----------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=40), st.floats(0, 0.99))
def test_the_hardest_are_left_out(scores, share):
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    left = without_hardest(torch.tensor(scores), torch.ones(len(scores), dtype=torch.bool), share)
    assert left.nonzero().flatten().tolist() == sorted(order[min(len(scores) - 1, round(share * len(scores))) :])


SCHEDULES = {
    "fixed": (
        {"trim_keep_start": 0.4, "trim_keep_end": 0.4},
        lambda hard, mass: hard[2:5],
    ),
    "all the rest": ({"trim_keep_start": 1.0, "trim_keep_end": 1.0}, lambda hard, mass: hard[2:]),
    "adaptive": (
        {"trim_schedule": "adaptive", "trim_mass": 0.7},
        lambda hard, mass: hard[2 : 3 + int((mass[hard[2:]].cumsum(0) < 0.7 * mass[hard[2:]].sum()).sum())],
    ),
}


@pytest.mark.parametrize("backward", ["auto", "replay"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_hardest_are_skipped(schedule, backward, tmp_path):
    arguments, kept_of = SCHEDULES[schedule]
    ours = train(
        tiny_vit(),
        digits(8),
        tmp_path,
        trim_skip_hardest=0.25,
        trim_backward=backward,
        num_train_epochs=1,
        **arguments,
    )
    reference = tiny_vit()

    def loss_of(batch):
        losses = F.cross_entropy(reference(batch["pixel_values"]).logits, batch["labels"], reduction="none")
        kept = kept_of(losses.detach().sort(descending=True).indices, 1 - torch.exp(-losses.detach()))
        return losses[kept].sum() / (6 if schedule == "adaptive" else len(kept))  # 6 of 8 are not skipped

    assert ours.losses == pytest.approx(descend(reference, ours.batches, loss_of), rel=1e-5)
    start = weights(tiny_vit())
    assert relative_difference(weights(ours) - start, weights(reference) - start) < 1e-5


@pytest.mark.parametrize("share", [-0.1, 1.0, True, "0.1"])
def test_a_wrong_share_is_refused(share, tmp_path):
    with pytest.raises(ValueError, match="trim_skip_hardest must be a share"):
        TrimmingArguments(str(tmp_path), trim_skip_hardest=share)


def test_a_share_that_skips_nothing_is_said(tmp_path, caplog):
    train(tiny_vit(), digits(40), tmp_path, trim_skip_hardest=0.01, **HALF)
    assert "trim_skip_hardest=0.01 skips none of the 8 items of a mini-batch" in caplog.text
