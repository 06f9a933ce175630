"""Training steps that are written in an unusual way are trimmed, or refused, or left alone where they must be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer

from hf_trim import TrimmingTrainer
from tests.support.heads import HEADS, make
from tests.support.helpers import digits, relative_difference, tiny_vit, train, weights


HALF = {"trim_keep_start": 0.5, "trim_keep_end": 0.5, "num_train_epochs": 1}


def with_compute_loss(function, base=TrimmingTrainer):
    return type("Own", (base,), {"compute_loss": function})


class Small(nn.Module):
    """A classifier whose loss is made by a function of the model, its features, logits and labels."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.features, self.head, self.loss = nn.Linear(64, 8), nn.Linear(8, 10), loss

    def forward(self, pixel_values, labels=None):
        features = self.features(pixel_values.flatten(1)).tanh()
        logits = self.head(features)
        return {"loss": self.loss(self, features, logits, labels), "logits": logits}


def plain_loss(model, features, logits, labels):
    return F.cross_entropy(logits, labels)


def assert_equal_runs(ours, theirs):
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-6)
    assert relative_difference(weights(ours), weights(theirs)) < 1e-6
    assert ours.state.log_history[0]["full_loss"] == pytest.approx(theirs.state.log_history[0]["full_loss"], rel=1e-6)


def test_a_compute_loss_that_calls_ours(tmp_path):
    class Tripled(TrimmingTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            ours = self.compute_loss
            self.compute_loss = lambda *args, **kwargs: 3 * ours(*args, **kwargs)

    def tripled(self, *args, **kwargs):
        return 3 * super(type(self), self).compute_loss(*args, **kwargs)

    expected = train(Small(plain_loss), digits(), tmp_path, trainer_cls=with_compute_loss(tripled), **HALF)
    assert_equal_runs(train(Small(plain_loss), digits(), tmp_path, trainer_cls=Tripled, **HALF), expected)


@pytest.mark.parametrize("calls_super", [True, False])
def test_a_training_step_of_ones_own(calls_super, tmp_path):
    class Own(TrimmingTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if calls_super:
                return super().training_step(model, inputs, num_items_in_batch)
            model.train()
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            return loss.detach()

    expected = train(Small(plain_loss), digits(), tmp_path, **HALF)
    assert_equal_runs(train(Small(plain_loss), digits(), tmp_path, trainer_cls=Own, **HALF), expected)


def test_a_training_step_without_compute_loss_is_refused(tmp_path):
    class Own(TrimmingTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**inputs)["loss"]
            self.accelerator.backward(loss)
            return loss.detach()

    with pytest.raises(ValueError, match="training_step of Own does not call self.compute_loss"):
        train(Small(plain_loss), digits(8), tmp_path, trainer_cls=Own, **HALF)
    train(Small(plain_loss), digits(8), tmp_path, trainer_cls=Own, trim_select="none")


def test_a_backward_pass_inside_of_compute_loss_is_that_of_all_samples(tmp_path):
    """Images that are shifted along their gradient: all of them are, as in plain training."""
    shifted = []

    def attack(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        images = inputs["pixel_values"].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(images, inputs["labels"])["loss"], images)
        shifted.append(int(gradient.flatten(1).any(1).sum()))
        assert type(gradient) is torch.Tensor
        return model(images.detach() + gradient.sign(), inputs["labels"])["loss"]

    arguments = {**HALF, "learning_rate": 0.0}
    plain = train(Small(plain_loss), digits(), tmp_path, trainer_cls=with_compute_loss(attack, Trainer), **arguments)
    ours = train(Small(plain_loss), digits(), tmp_path, trainer_cls=with_compute_loss(attack), **arguments)
    assert shifted == [8] * 12
    assert [log["full_loss"] for log in ours.state.log_history[:-1]] == pytest.approx(plain.losses, rel=1e-6)
    assert ours.losses[0] > plain.losses[0]


def test_a_copy_of_the_model_inside_of_compute_loss(tmp_path):
    def with_copy(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        copied = copy.deepcopy(model)
        loss = model(**inputs)["loss"]
        return loss + 0 * copied(**inputs)["logits"].detach().sum()

    expected = train(Small(plain_loss), digits(), tmp_path, **HALF)
    assert_equal_runs(
        train(Small(plain_loss), digits(), tmp_path, trainer_cls=with_compute_loss(with_copy), **HALF), expected
    )


def test_losses_inside_of_a_transform_are_let_alone(tmp_path):
    def with_vmap(model, features, logits, labels):
        model.metric = torch.vmap(F.cross_entropy)(logits, labels).mean()
        return F.cross_entropy(logits, labels)

    expected = train(Small(plain_loss), digits(), tmp_path, **HALF)
    assert_equal_runs(train(Small(with_vmap), digits(), tmp_path, **HALF), expected)


def test_a_penalty_of_parameters_is_no_item(tmp_path, caplog):
    def with_penalty(model, features, logits, labels):
        weight = model.features.weight  # as many rows as samples
        return F.cross_entropy(logits, labels) + F.mse_loss(weight, torch.zeros_like(weight))

    def by_hand(model, features, logits, labels):
        return F.cross_entropy(logits, labels) + (model.features.weight**2).mean()

    ours = train(Small(with_penalty), digits(), tmp_path, **HALF)
    assert_equal_runs(ours, train(Small(by_hand), digits(), tmp_path, **HALF))
    assert ours.state.log_history[0]["kept_fraction"] == 0.5


def test_what_of_the_loss_is_not_trimmed_is_said_once(tmp_path, caplog):
    def with_rest(model, features, logits, labels):
        return F.cross_entropy(logits, labels) + features.square().mean()

    train(Small(with_rest), digits(), tmp_path, **HALF)
    assert caplog.text.count("is no weighted sum of what torch's loss functions returned") == 1


def test_one_call_for_each_sample_is_told(tmp_path, caplog):
    def one_by_one(model, features, logits, labels):
        return torch.stack([F.cross_entropy(logits[i], labels[i]) for i in range(len(labels))]).mean()

    train(Small(one_by_one), digits(), tmp_path, **HALF)
    assert caplog.text.count("Each call of a loss function has a single item") == 1


# ---- replay ---------------------------------------------------------------------------------------------------------


def teacher(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    with torch.no_grad():
        weight = model(**inputs)["loss"]
    return model(**inputs)["loss"] + 0 * weight


def metric(model, features, logits, labels):
    with torch.no_grad():
        model.metric = F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


@pytest.mark.parametrize(
    "loss, trainer_cls",
    [(plain_loss, with_compute_loss(teacher)), (metric, TrimmingTrainer)],
    ids=["teacher", "metric"],
)
def test_calls_without_a_graph_are_no_part_of_a_replay(loss, trainer_cls, tmp_path):
    dense = train(Small(loss), digits(), tmp_path, trainer_cls=trainer_cls, trim_backward="dense", **HALF)
    replay = train(Small(loss), digits(), tmp_path, trainer_cls=trainer_cls, trim_backward="replay", **HALF)
    assert_equal_runs(replay, dense)


def divided_by_hand(model, features, logits, labels):
    return F.cross_entropy(logits, labels, reduction="sum") / len(labels)


def compared(model, features, logits, labels):
    features = F.normalize(features)
    return F.cross_entropy(features @ features.detach().T / 0.1, torch.arange(len(features)))


def gradient_of_images(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    images = inputs["pixel_values"].clone().requires_grad_()
    torch.autograd.grad(model(images, inputs["labels"])["loss"], images)
    return model(**inputs)["loss"]


@pytest.mark.parametrize(
    "loss, trainer_cls, match",
    [
        (divided_by_hand, TrimmingTrainer, "With the kept samples alone the loss is .* Set trim_backward='sparse'"),
        (compared, TrimmingTrainer, "or over other classes .*: set trim_backward='sparse'"),
        (plain_loss, with_compute_loss(gradient_of_images), "cannot be scored without a graph, as .*replay"),
    ],
    ids=["divided", "compared", "gradient"],
)
def test_replays_that_cannot_be_right_are_refused(loss, trainer_cls, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        train(Small(loss), digits(8), tmp_path, trainer_cls=trainer_cls, trim_backward="replay", **HALF)


def test_texts_in_another_order_than_their_labels_are_refused(tmp_path):
    class TimeFirst(type(make("token-classification"))):
        def forward(self, labels=None, **kwargs):
            logits = super().forward(**kwargs).logits
            loss = F.cross_entropy(logits.transpose(0, 1).flatten(0, 1), labels.T.flatten())
            return {"loss": loss, "logits": logits}

    rows = HEADS["token-classification"][1]()
    model = TimeFirst(make("token-classification").config)
    train(model, rows[:8], tmp_path, **HALF)
    with pytest.raises(ValueError, match="which belong to which is not known"):
        train(model, rows[:8], tmp_path, trim_unit="sample", **HALF)


def test_the_model_is_as_it_was_after_an_error(tmp_path):
    def failing(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        model(**inputs)
        raise RuntimeError("something else")

    model = tiny_vit()
    with pytest.raises(RuntimeError, match="something else"):
        train(model, digits(8), tmp_path, trainer_cls=with_compute_loss(failing), **HALF)
    assert "forward" not in vars(model)
    assert_equal_runs(train(model, digits(), tmp_path, **HALF), train(tiny_vit(), digits(), tmp_path, **HALF))
