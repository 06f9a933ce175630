"""Models and trainers of every kind against plain Trainer (p = 1) and against a loop in plain PyTorch (p < 1)."""

import pytest
import torch
from transformers import Trainer, set_seed

from hf_trim import TrimmingArguments, TrimmingMixin, TrimmingTrainer, mark_losses
from tests.support.helpers import digits, grouped, relative_difference, tiny_vit, train, weights
from tests.support.situations import REFUSED, SITUATIONS, classes, lowest_kept, mse_dict, pixels


FALLING = {"trim_keep_start": 1.0, "trim_keep_end": 0.3}  # in two epochs: p = 1, then 0.3
UNTRIMMED = {"trim_keep_start": 1.0, "trim_keep_end": 1.0}


def trained(situation, tmp_path, accumulate, plain=False, **arguments):
    settings = {**situation.settings(plain), "gradient_accumulation_steps": accumulate, **arguments}
    # Micro-batches of 8, 8 and 3, or two steps an epoch: of 8 + 8 + 8 and of 8 + 3.
    rows = situation.rows()[:19] if accumulate == 1 else situation.rows()
    return train(situation.make(), rows, tmp_path, **settings)


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same_way(trained_model, expected_model, start):
    """Both went the same way from the start, and did go."""
    way = weights(expected_model) - start
    assert way.norm() > 1e-3
    assert relative_difference(weights(trained_model), weights(expected_model)) < 1e-6
    assert relative_difference(weights(trained_model) - start, way) < 3e-5


def assert_follows_the_loop(situation, ours, accumulate, fractions):
    reference = situation.make()
    losses, full_losses = situation.descend(reference, grouped(ours.batches, 2, accumulate), fractions)
    if situation.has_loss:
        assert ours.losses == pytest.approx(losses, rel=1e-5, abs=1e-6)
    assert_same_way(ours, reference, weights(situation.make()))
    return full_losses


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.extended), 3])
@pytest.mark.parametrize("name", SITUATIONS)
def test_without_trimming_equals_plain_trainer(name, accumulate, tmp_path):
    situation = SITUATIONS[name]
    plain = trained(situation, tmp_path, accumulate, plain=True)
    assert_follows_the_loop(situation, plain, accumulate, [1.0, 1.0])  # so does the loop

    ours = trained(situation, tmp_path, accumulate, **UNTRIMMED)
    if situation.exact:
        assert ours.losses == plain.losses
        assert torch.equal(weights(ours), weights(plain))
    else:
        assert ours.losses == pytest.approx(plain.losses, rel=1e-5)
        assert_same_way(ours, plain, weights(situation.make()))

    # p = 1 in the first epoch, through the trimming code this time.
    ours = trained(situation, tmp_path, accumulate, **FALLING)
    first = len(plain.losses) // 2
    if situation.exact:
        assert ours.losses[:first] == plain.losses[:first]
    else:
        assert ours.losses[:first] == pytest.approx(plain.losses[:first], rel=1e-5)
    assert ours.losses[first:] != pytest.approx(plain.losses[first:], rel=3e-3)
    for entry in logs(ours)[:first]:
        assert entry["keep_fraction"] == entry["kept_fraction"] == 1 and "trim_threshold" not in entry
        if situation.has_full_loss:
            assert entry["full_loss"] == pytest.approx(entry["loss"], rel=1e-6)


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.extended), 3])
@pytest.mark.parametrize("name", SITUATIONS)
def test_trimming_follows_the_loop(name, accumulate, tmp_path):
    situation = SITUATIONS[name]
    ours = trained(situation, tmp_path, accumulate, trim_keep_start=0.6, trim_keep_end=0.3)
    full_losses = assert_follows_the_loop(situation, ours, accumulate, [0.6, 0.3])
    if situation.has_full_loss:
        assert [entry["full_loss"] for entry in logs(ours)] == pytest.approx(full_losses, rel=1e-5, abs=1e-6)
    half = len(full_losses) // 2
    assert [entry["keep_fraction"] for entry in logs(ours)] == pytest.approx([0.6] * half + [0.3] * half)
    assert all("trim_threshold" in entry for entry in logs(ours))


@pytest.mark.parametrize("backward", ["dense", "sparse", "replay"])
@pytest.mark.parametrize(
    "name",
    ["two-label-columns", "no-labels", "head-that-counts", "labels-left-in-head", "labels-popped-subclass",
     "two-passes", "missing-targets", "two-tasks-apart", "class-weights-counts-func", "marked-in-trainer",
     "tuple-batch"],
)  # fmt: skip
def test_every_backward_pass_follows_the_loop(name, backward, tmp_path):
    situation = SITUATIONS[name]
    ours = trained(situation, tmp_path, 3, trim_backward=backward, **FALLING)
    assert_follows_the_loop(situation, ours, 3, [1.0, 0.3])


@pytest.mark.parametrize(
    "name", ["mse-dict", "no-labels", "head-that-counts", "chunks", "chunks-counted", "masked-prompts-llama", "margin",
             "samples-func", "marked-focal", "marked-next-tokens"],
)  # fmt: skip
def test_the_threshold_is_the_loss_of_an_item(name, tmp_path):
    situation = SITUATIONS[name]
    ours = trained(situation, tmp_path, 1, trim_keep_start=0.3, trim_keep_end=0.3, max_steps=1)
    expected = situation.loss(situation.make(), ours.batches[0], lowest_kept(0.3)).item()
    assert ours.state.log_history[0]["trim_threshold"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "name", ["labels-popped", "class-weights-counts-func", "class-weights-mean-func", "samples-func",
             "next-tokens-func", "next-tokens-flat-func", "label-smoothing", "marked-sample-weights"],
)  # fmt: skip
def test_evaluation_is_never_trimmed(name, tmp_path):
    situation = SITUATIONS[name]
    arguments = {"max_steps": 1, "label_names": ["labels"]}
    plain = trained(situation, tmp_path, 1, plain=True, **arguments)
    ours = trained(situation, tmp_path, 1, trim_keep_start=0.3, trim_keep_end=0.3, **arguments)
    ours.model.load_state_dict(plain.model.state_dict())
    rows = situation.rows()[19:]
    expected = plain.evaluate(rows)["eval_loss"]
    assert ours.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_marked_losses_are_as_they_were_outside_of_a_training_step():
    losses = torch.rand(8)
    assert mark_losses(losses) is losses
    assert mark_losses(losses, counts=torch.ones(8)) is losses


# ---- what cannot be trimmed -----------------------------------------------------------------------------------------


def refused(name):
    set_seed(0)
    return pixels(REFUSED[name])()


@pytest.mark.parametrize("arguments", [FALLING, {"trim_keep_start": 0.5, "trim_keep_end": 0.5}], ids=["p=1", "p=0.5"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trimmed_is_refused_in_the_first_batch(name, arguments, tmp_path):
    model = refused(name)
    with pytest.raises(ValueError, match="loss"):
        train(model, classes(), tmp_path, **arguments)
    assert torch.equal(weights(model), weights(refused(name)))


@pytest.mark.parametrize("arguments", [UNTRIMMED, {"trim_select": "none"}], ids=["p=1", "none"])
@pytest.mark.parametrize("name", REFUSED)
def test_without_trimming_nothing_is_refused(name, arguments, tmp_path):
    plain = train(refused(name), classes(), tmp_path, trainer_cls=Trainer)
    ours = train(refused(name), classes(), tmp_path, **arguments)
    assert ours.losses == plain.losses
    assert torch.equal(weights(ours), weights(plain))


def test_losses_marked_in_the_forward_pass_are_not_replayed(tmp_path):
    with pytest.raises(ValueError, match="mark_losses in a model's forward pass cannot go with .*'replay'"):
        trained(SITUATIONS["marked-focal"], tmp_path, 1, trim_backward="replay", trim_keep_start=0.5)


# ---- outputs, settings, warnings ------------------------------------------------------------------------------------


class WithAccuracy(Trainer):
    """Reads the training accuracy from the outputs."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        assert outputs.logits.shape == (len(inputs["labels"]), 10)
        self.accuracies.append(float((outputs.logits.argmax(1) == inputs["labels"]).float().mean()))
        return (loss, outputs) if return_outputs else loss


def test_outputs_have_all_samples_under_replay(tmp_path):
    def accuracies(backward):
        class Ours(TrimmingMixin, WithAccuracy):
            accuracies = []

        train(tiny_vit(), digits(19), tmp_path, trainer_cls=Ours, trim_backward=backward, **FALLING)
        return Ours.accuracies

    dense = accuracies("dense")
    assert len(dense) == 6
    replayed = accuracies("replay")  # once for each time that `compute_loss` is called
    assert len(replayed) > 6 and set(replayed) == set(dense)


def trainer_with(tmp_path, **changes):
    """A trainer the settings of which are changed after it was made, as a hyperparameter search does."""
    args = TrimmingArguments(
        str(tmp_path), num_train_epochs=1, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant",
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, trim_keep_start=0.5, trim_keep_end=0.5,
    )  # fmt: skip
    trainer = TrimmingTrainer(tiny_vit(), args, train_dataset=digits(19))
    for name, value in changes.items():
        setattr(trainer.args, name, value)
    return trainer


@pytest.mark.parametrize("changes", [UNTRIMMED, {"trim_select": "none"}, {"trim_keep_start": 0.9}, {}], ids=str)
def test_settings_changed_after_construction_count(changes, tmp_path):
    changed = trainer_with(tmp_path, **changes)
    changed.train()
    set_as_given = {"trim_keep_start": 0.5, "trim_keep_end": 0.5, **changes}
    expected = train(tiny_vit(), digits(19), tmp_path, num_train_epochs=1, seed=42, **set_as_given)
    assert torch.equal(weights(changed), weights(expected))


@pytest.mark.parametrize(
    "changes",
    [{"trim_keep_end": 2.0}, {"trim_keep_end": 0.6}, {"trim_select": "softest"}, {"trim_backward": "fast"}],
    ids=str,
)
def test_settings_changed_after_construction_are_validated(changes, tmp_path):
    trainer = trainer_with(tmp_path, **changes)
    with pytest.raises(ValueError, match=next(iter(changes))):
        trainer.train()


def test_one_sample_a_micro_batch_warns_once(tmp_path, caplog):
    def warnings(batch_size):
        caplog.clear()
        train(
            pixels(mse_dict, 1)(), digits(19, "regression"), tmp_path, per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8, trim_keep_start=0.5, trim_keep_end=0.5, trim_backward="dense",
        )  # fmt: skip
        return [record.getMessage() for record in caplog.records if record.name.startswith("hf_trim")]

    others = warnings(8)
    assert len([message for message in warnings(1) if message not in others]) == 1
