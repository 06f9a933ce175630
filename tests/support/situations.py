"""
Ways in which models and trainers come by their loss, each with a tiny model, real data, and the same loss in plain
PyTorch: `loss(model, batch, mean)` is that of one micro-batch, where `mean` averages unreduced losses. With the mean
over all it is what plain `Trainer` trains on, with the mean over the hardest what hf_trim should train on.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_trim import TrimmingMixin, TrimmingTrainer, mark_losses
from tests.support.heads import BERT, GPT2, LLAMA, span, tokens_or_none, without
from tests.support.helpers import digit_texts, digits


ROWS = 35  # micro-batches of 8, 8, 8, 8 and 3; the first 19 of them: 8, 8 and 3


def hardest_mean(fraction):
    """The mean over the hardest items. What each counts for in it is a weight, or 0 where it is no item."""

    def mean(losses, counts=None):
        losses = losses.flatten()
        counts = torch.ones_like(losses) if counts is None else counts.flatten().to(losses)
        losses, counts = losses[counts > 0], counts[counts > 0]
        kept = losses.topk(max(1, round(fraction * len(losses)))).indices
        return losses[kept].sum() / counts[kept].sum()

    return mean


def lowest_kept(fraction):
    """In the place of a mean: the lowest loss that it keeps, which is what is logged as the threshold."""

    def lowest(losses, counts=None):
        losses = losses.flatten() if counts is None else losses[counts > 0]
        return losses.topk(max(1, round(fraction * len(losses)))).values[-1]

    return lowest


# ---- what a micro-batch counts for in plain `Trainer` ---------------------------------------------------------------


def by_steps(step, batch):
    """`Trainer` divides by the number of micro-batches."""
    return 1 / len(step)


def undivided(step, batch):
    """`Trainer` takes the loss for divided by the number of labels (`num_items_in_batch`), but nobody divided it."""
    return 1.0


def by_labels(step, batch):
    """The model, or a function of the user's, divides its sum by the number of labels of the whole step."""
    return labels_in(batch) / sum(map(labels_in, step))


def by_next_labels(step, batch):
    """The same where the first label of a text is predicted by nothing, and not counted."""
    return next_labels_in(batch) / sum(map(next_labels_in, step))


def by_uncounted_next_labels(step, batch):
    """The same where `Trainer` counts the first labels all the same."""
    return next_labels_in(batch) / sum(map(labels_in, step))


def by_class_weights(step, batch):
    """A weighted sum is divided by the number of labels, not by their weights."""
    return CLASS_WEIGHTS[batch["labels"]].sum() / sum(map(labels_in, step))


def labels_in(batch):
    return int((batch["labels"] != -100).sum())


def next_labels_in(batch):
    return int((batch["labels"][:, 1:] != -100).sum())


# ---- data -----------------------------------------------------------------------------------------------------------


def regression():
    return digits(ROWS, "regression")


def classes():
    return digits(ROWS)


def short_texts():
    return digit_texts(ROWS)


def renamed():
    return [{"pixel_values": row["pixel_values"], "target": row["labels"]} for row in digits(ROWS)]


def two_labels():
    return [
        {"pixel_values": row["pixel_values"], "digit": row["labels"], "brightness": row["pixel_values"].mean()}
        for row in digits(ROWS)
    ]


def images():
    return without(digits(ROWS), "labels")


def weighted_samples():
    return [{**row, "sample_weight": (0.0, 0.5, 1.0, 2.0)[row["labels"] % 4]} for row in digits(ROWS)]


def taught():
    """With a teacher's probabilities: here the brightness of some pixels."""
    return [{**row, "teacher": row["pixel_values"].flatten()[20:30].mul(3).softmax(0)} for row in digits(ROWS)]


def tokens():
    return [{"input_ids": row["input_ids"], **tokens_or_none(row)} for row in digit_texts(ROWS)]


def questions():
    """Some answers are outside of the window."""
    rows = []
    for row in digit_texts(ROWS):
        outside = {"start_positions": 99, "end_positions": 99}
        rows.append({**row, **(outside if row["labels"] % 4 == 0 else span(row))})
    return without(rows, "labels")


def some_missing(rows):
    """Of 8 samples 3 have a target."""
    batch = default_data_collator(rows)
    batch["labels"][3:] = torch.nan
    return batch


def either_task(rows):
    """Of 8 samples each has one of two tasks."""
    batch = default_data_collator(rows)
    batch["task"] = torch.arange(len(rows)) % 2
    return batch


def some_prompts_masked(rows):
    """Prompts are masked in about half of the micro-batches: there are fewer labels in these."""
    batch = default_data_collator(rows)
    if batch["labels"][0, 2] % 2:
        batch["labels"][:, :6] = -100
        batch["labels"][0, 6] = batch["input_ids"][0, 6]  # at least one label
    return batch


def two_images_each(rows):
    """There are twice as many images as samples."""
    batch = default_data_collator(rows)
    batch["pixel_values"] = torch.stack([batch["pixel_values"], batch["pixel_values"].flip(-1)], 1).flatten(0, 1)
    return batch


def as_tuple(rows):
    batch = default_data_collator(rows)
    return batch["pixel_values"], batch["labels"]


# ---- models: each `forward` is of a plain `torch.nn.Module` ---------------------------------------------------------

CLASS_WEIGHTS = torch.linspace(0.5, 2.0, 10)


class Pixels(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.hidden, self.output = nn.Linear(64, 16), nn.Linear(16, outputs)

    def features(self, pixel_values):
        return torch.tanh(self.hidden(pixel_values.flatten(1)))

    def scores(self, pixel_values):
        return self.output(self.features(pixel_values))


class Tokens(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.embedding, self.output = nn.Embedding(20, 16), nn.Linear(16, outputs)

    def scores(self, input_ids):
        embedded = self.embedding(input_ids)
        return self.output(torch.tanh(embedded + embedded.roll(1, 1)))


def pixels(forward, outputs=10):
    return lambda: type("Model", (Pixels,), {"forward": forward})(outputs)


def texts(forward):
    return lambda: type("Model", (Tokens,), {"forward": forward})(20)


class OwnConfig(PreTrainedConfig):
    model_type = "of-a-user"


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.net = Pixels(10)
        self.post_init()

    def _init_weights(self, module):
        pass

    def scores(self, pixel_values):
        return self.net.scores(pixel_values)

    def forward(self, pixel_values, labels=None):
        logits = self.scores(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def mse_dict(self, pixel_values, labels):
    return {"loss": F.mse_loss(self.scores(pixel_values)[:, 0], labels)}


def mse_tuple(self, pixel_values, labels):
    scores = self.scores(pixel_values)[:, 0]
    return F.mse_loss(scores, labels), scores


def mse_with_kwargs(self, pixel_values, labels, **kwargs):
    return {"loss": nn.MSELoss()(self.scores(pixel_values)[:, 0], labels)}


def target_column(self, pixel_values, target):
    return {"loss": F.cross_entropy(self.scores(pixel_values), target)}


def two_tasks(self, pixel_values, digit, brightness):
    scores = self.scores(pixel_values)
    return {"loss": F.cross_entropy(scores[:, :10], digit) + 0.4 * F.mse_loss(scores[:, 10], brightness)}


def two_tasks_of_two_images(self, pixel_values, digit, brightness):
    scores = self.scores(pixel_values).unflatten(0, (-1, 2)).mean(1)
    return {"loss": F.cross_entropy(scores[:, :10], digit) + 0.4 * F.mse_loss(scores[:, 10], brightness)}


def autoencoder(self, pixel_values):
    return {"loss": F.mse_loss(self.scores(pixel_values), pixel_values.flatten(1))}


def autoencoder_summed(self, pixel_values):
    squares = F.mse_loss(self.scores(pixel_values), pixel_values.flatten(1), reduction="sum")
    return {"loss": squares / len(pixel_values)}


def logits_only(self, pixel_values):
    return {"logits": self.scores(pixel_values)}


def bare_logits(self, pixel_values):
    return self.scores(pixel_values)


def tasks_apart(self, pixel_values, labels, task):
    scores, loss = self.scores(pixel_values), 0.0
    for number in (0, 1):
        if (task == number).any():
            loss = loss + F.cross_entropy(scores[task == number, number::2], labels[task == number] // 2)
    return {"loss": loss}


def masked_regression(self, pixel_values, labels):
    there = ~labels.isnan()
    return {"loss": F.mse_loss(self.scores(pixel_values)[there, 0], labels[there])}


def half_sums(scores, labels):
    """The sum of the losses of each half of the sequences."""
    for part, target in zip(scores.split(5, 1), labels.split(5, 1), strict=True):
        yield F.cross_entropy(part.flatten(0, 1), target.flatten(), reduction="sum")


def in_chunks(self, input_ids, labels):
    return {"loss": sum(half_sums(self.scores(input_ids), labels)) / (labels != -100).sum()}


def in_chunks_counted(self, input_ids, labels, num_items_in_batch=None, **kwargs):
    return {"loss": sum(half_sums(self.scores(input_ids), labels)) / num_items_in_batch}


def token_means(self, input_ids, labels):
    return {"loss": F.cross_entropy(self.scores(input_ids).flatten(0, 1), labels.flatten())}


def same_targets(self, input_ids, labels):
    targets = labels.flatten()
    early = self.output(self.embedding(input_ids))
    loss = F.cross_entropy(self.scores(input_ids).flatten(0, 1), targets)
    return {"loss": loss + 0.5 * F.cross_entropy(early.flatten(0, 1), targets)}


def weighted_classes(self, pixel_values, labels):
    return {"loss": nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)(self.scores(pixel_values), labels)}


def with_auxiliary_term(self, pixel_values, labels):
    features = self.features(pixel_values)
    return {"loss": F.cross_entropy(self.output(features), labels) + 0.1 * features.pow(2).mean()}


def with_metric(self, pixel_values, labels):
    scores = self.scores(pixel_values)
    metric = F.cross_entropy(scores, (labels + 1) % 10)  # with a graph, but not in the loss
    with torch.no_grad():
        error = F.l1_loss(scores.argmax(1).float(), labels.float())
    return {"loss": F.cross_entropy(scores, labels), "metric": metric, "error": error}


def distillation(self, pixel_values, labels, teacher):
    scores = self.scores(pixel_values)
    distance = F.kl_div(F.log_softmax(scores / 2, 1), teacher, reduction="batchmean")
    return {"loss": 0.3 * F.cross_entropy(scores, labels) + 0.7 * 4 * distance}


def gaussian(self, pixel_values, labels):
    mean, log_variance = self.scores(pixel_values).unbind(1)
    return {"loss": F.gaussian_nll_loss(mean, labels, log_variance.exp())}


def margin(self, pixel_values, labels):
    return {"loss": F.multi_margin_loss(self.scores(pixel_values), labels)}


def linear_cross_entropy(self, pixel_values, labels):
    features = self.features(pixel_values)
    return {"loss": F.linear_cross_entropy(features, self.output.weight, labels, linear_bias=self.output.bias)}


def focal_losses(scores, labels):
    """By hand, without one of torch's loss functions."""
    likelihood = scores.log_softmax(1).gather(1, labels[:, None])[:, 0]
    return -((1 - likelihood.exp()) ** 2) * likelihood


def smoothed_losses(scores, labels):
    likelihoods = scores.log_softmax(1)
    return -0.9 * likelihoods.gather(1, labels[:, None])[:, 0] - 0.1 * likelihoods.mean(1)


def marked_focal(self, pixel_values, labels):
    return {"loss": mark_losses(focal_losses(self.scores(pixel_values), labels)).mean()}


def marked_smoothing(self, pixel_values, labels):
    return {"loss": mark_losses(smoothed_losses(self.scores(pixel_values), labels)).mean()}


def marked_samples(self, pixel_values, labels, sample_weight):
    losses = F.cross_entropy(self.scores(pixel_values), labels, reduction="none")
    return {"loss": mark_losses(sample_weight * losses, sample_weight).sum() / sample_weight.sum()}


def marked_products(self, pixel_values, labels, sample_weight):
    losses = F.cross_entropy(self.scores(pixel_values), labels, reduction="none")
    return {"loss": mark_losses((1 + sample_weight) * losses).mean()}


def next_losses(scores, labels):
    """The losses `[B, T - 1]` of predicting the next token, and which are items."""
    losses = F.cross_entropy(scores[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return losses, labels[:, 1:] != -100


def marked_next(self, input_ids, labels):
    losses, valid = next_losses(self.scores(input_ids), labels)
    return {"loss": mark_losses(losses, valid).sum() / valid.sum()}


def marked_flat(self, input_ids, labels):
    valid = labels.flatten() != -100
    losses = F.cross_entropy(self.scores(input_ids).flatten(0, 1), labels.flatten(), reduction="none")
    return {"loss": (mark_losses(losses, valid) * valid).sum() / valid.sum()}


# ---- what cannot be trimmed -----------------------------------------------------------------------------------------


def focal_by_hand(self, pixel_values, labels):
    return {"loss": focal_losses(self.scores(pixel_values), labels).mean()}


def independent_of_calls(self, pixel_values, labels):
    scores = self.scores(pixel_values)
    return {"loss": focal_losses(scores, labels).mean(), "metric": F.cross_entropy(scores, labels)}


def mean_by_hand(self, pixel_values, labels):
    return {"loss": F.cross_entropy(self.scores(pixel_values), labels, reduction="none").mean()}


REFUSED = {
    "focal-by-hand": focal_by_hand, "independent-of-calls": independent_of_calls, "mean-by-hand": mean_by_hand,
}  # fmt: skip


# ---- trainers: what stands before `Trainer` among the bases ---------------------------------------------------------


class LabelsLeft:
    """As in transformers' documentation. The model computes a loss of its own as well."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs["logits"], inputs["labels"], weight=CLASS_WEIGHTS)
        return (loss, outputs) if return_outputs else loss


class LabelsPopped:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)(outputs["logits"], labels)
        return (loss, outputs) if return_outputs else loss


class TupleBatch:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(inputs[0])
        loss = F.cross_entropy(logits, inputs[1])
        return (loss, logits) if return_outputs else loss


class TwoPasses:
    """Two views of each sample, as in R-Drop."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(inputs["pixel_values"]), model(inputs["pixel_values"].flip(-1))
        loss = sum(F.cross_entropy(output["logits"], inputs["labels"]) for output in outputs) / 2
        return (loss, outputs[0]) if return_outputs else loss


class MarkedLoss:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(inputs["pixel_values"])
        loss = mark_losses(focal_losses(outputs["logits"], inputs["labels"])).mean()
        return (loss, outputs) if return_outputs else loss


class Adversarial:
    """Trains on images that are shifted along the sign of their gradient (FGSM)."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        images = inputs["pixel_values"].clone().requires_grad_()
        loss = self.compute_loss(model, {**inputs, "pixel_values": images}, num_items_in_batch=num_items_in_batch)
        (gradient,) = torch.autograd.grad(loss, images)
        inputs = {**inputs, "pixel_values": (images + 0.1 * gradient.sign()).detach()}
        return super().training_step(model, inputs, num_items_in_batch)


class SecondLoss:
    """Adds the gradients of another view of the samples after the step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
        second = self.compute_loss(model, other, num_items_in_batch=num_items_in_batch)
        second = second / self.current_gradient_accumulation_steps
        self.accelerator.backward(second)
        return loss + second.detach()


class EvalMode:
    def compute_loss(self, model, *args, **kwargs):
        model.eval()  # without dropout
        return super().compute_loss(model, *args, **kwargs)


# ---- loss functions for `compute_loss_func`: ours, and what plain `Trainer` needs in its place ----------------------


def weighted_mean(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs["logits"], labels, weight=CLASS_WEIGHTS)


def weighted_sum(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs["logits"], labels, weight=CLASS_WEIGHTS, reduction="sum") / num_items_in_batch


def weighted_losses(outputs, labels, num_items_in_batch=None):
    losses = F.cross_entropy(outputs["logits"], labels, weight=CLASS_WEIGHTS, reduction="none")
    return losses, CLASS_WEIGHTS[labels]


def weighted_losses_plainly(outputs, labels, num_items_in_batch=None):
    return weighted_mean(outputs, labels) * len(labels) / num_items_in_batch


def losses_of_samples(outputs, labels, num_items_in_batch=None):
    return focal_losses(outputs["logits"], labels)


def losses_of_samples_plainly(outputs, labels, num_items_in_batch=None):
    return focal_losses(outputs["logits"], labels).sum() / num_items_in_batch


def losses_of_next(outputs, labels, num_items_in_batch=None):
    return next_losses(outputs["logits"], labels)[0]


def losses_of_next_flat(outputs, labels, num_items_in_batch=None):
    return losses_of_next(outputs, labels).flatten()


def losses_of_next_plainly(outputs, labels, num_items_in_batch=None):
    return losses_of_next(outputs, labels).sum() / num_items_in_batch


# ---- the loss of a micro-batch --------------------------------------------------------------------------------------


def squared(model, batch, mean):
    return mean((model.scores(batch["pixel_values"])[:, 0] - batch["labels"]) ** 2)


def negative_likelihoods(scores, labels):
    return -scores.log_softmax(1).gather(1, labels[:, None])[:, 0]


def classified(model, batch, mean):
    return mean(negative_likelihoods(model.scores(batch["pixel_values"]), batch["labels"]))


def classified_by_head(model, batch, mean):
    inputs = without([batch], "labels")[0]
    return mean(negative_likelihoods(model(**inputs, return_dict=True).logits, batch["labels"]))


def classified_in_eval_mode(model, batch, mean):
    return classified_by_head(model.eval(), batch, mean)


def classified_by_weight(model, batch, mean):
    scores = model(batch["pixel_values"])["logits"]
    counts = CLASS_WEIGHTS[batch["labels"]]
    return mean(counts * negative_likelihoods(scores, batch["labels"]), counts)


def classified_by_weight_inside(model, batch, mean):
    counts = CLASS_WEIGHTS[batch["labels"]]
    return mean(counts * negative_likelihoods(model.scores(batch["pixel_values"]), batch["labels"]), counts)


def classified_tuples(model, batch, mean):
    return mean(negative_likelihoods(model(batch[0]), batch[1]))


def classified_twice(model, batch, mean):
    views = batch["pixel_values"], batch["pixel_values"].flip(-1)
    return mean(sum(negative_likelihoods(model.scores(view), batch["labels"]) for view in views) / 2)


def classified_one_after_the_other(model, batch, mean):
    other = {**batch, "pixel_values": batch["pixel_values"].flip(-1)}
    return classified(model, batch, mean) + classified(model, other, mean)


def attacked(model, batch, mean):
    images = batch["pixel_values"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(classified(model, {**batch, "pixel_values": images}, mean), images)
    return classified(model, {**batch, "pixel_values": (images + 0.1 * gradient.sign()).detach()}, mean)


def of_target_column(model, batch, mean):
    return mean(negative_likelihoods(model.scores(batch["pixel_values"]), batch["target"]))


def of_two_tasks(model, batch, mean):
    scores = model.scores(batch["pixel_values"])
    brightness = (scores[:, 10] - batch["brightness"]) ** 2
    return mean(negative_likelihoods(scores[:, :10], batch["digit"]) + 0.4 * brightness)


def of_two_images(model, batch, mean):
    scores = (model.scores(batch["pixel_values"][::2]) + model.scores(batch["pixel_values"][1::2])) / 2
    brightness = (scores[:, 10] - batch["brightness"]) ** 2
    return mean(negative_likelihoods(scores[:, :10], batch["digit"]) + 0.4 * brightness)


def of_autoencoder(model, batch, mean):
    return mean(((model.scores(batch["pixel_values"]) - batch["pixel_values"].flatten(1)) ** 2).mean(1))


def of_autoencoder_summed(model, batch, mean):
    return mean(((model.scores(batch["pixel_values"]) - batch["pixel_values"].flatten(1)) ** 2).sum(1))


def of_tasks_apart(model, batch, mean):
    scores, loss = model.scores(batch["pixel_values"]), 0.0
    for number in (0, 1):
        mine = batch["task"] == number
        loss = loss + mean(negative_likelihoods(scores[mine, number::2], batch["labels"][mine] // 2))
    return loss


def of_those_labelled(model, batch, mean):
    there = ~batch["labels"].isnan()
    return mean((model.scores(batch["pixel_values"])[there, 0] - batch["labels"][there]) ** 2)


def of_tokens(model, batch, mean):
    valid = batch["labels"] != -100
    return mean(negative_likelihoods(model.scores(batch["input_ids"])[valid], batch["labels"][valid]))


def of_same_targets(model, batch, mean):
    valid, targets = batch["labels"] != -100, batch["labels"][batch["labels"] != -100]
    early = model.output(model.embedding(batch["input_ids"]))[valid]
    losses = negative_likelihoods(model.scores(batch["input_ids"])[valid], targets)
    return mean(losses + 0.5 * negative_likelihoods(early, targets))


def of_next_tokens(model, batch, mean):
    scores = model.scores(batch["input_ids"]) if isinstance(model, Tokens) else model(batch["input_ids"]).logits
    return mean(*next_losses(scores, batch["labels"]))


def of_answers(model, batch, mean):
    inside = batch["start_positions"] < batch["input_ids"].shape[1]
    outputs = model(batch["input_ids"], batch["attention_mask"])
    start = negative_likelihoods(outputs.start_logits[inside], batch["start_positions"][inside])
    return mean((start + negative_likelihoods(outputs.end_logits[inside], batch["end_positions"][inside])) / 2)


def of_auxiliary_term(model, batch, mean):
    return classified(model, batch, mean) + 0.1 * model.features(batch["pixel_values"]).pow(2).mean()


def of_distillation(model, batch, mean):
    scores, teacher = model.scores(batch["pixel_values"]), batch["teacher"]
    distance = (teacher * (teacher.log() - (scores / 2).log_softmax(1))).sum(1)
    return mean(0.3 * negative_likelihoods(scores, batch["labels"]) + 0.7 * 4 * distance)


def of_gaussian(model, batch, mean):
    center, log_variance = model.scores(batch["pixel_values"]).unbind(1)
    return mean((log_variance + (center - batch["labels"]) ** 2 / log_variance.exp()) / 2)


def of_margin(model, batch, mean):
    scores, labels = model.scores(batch["pixel_values"]), batch["labels"]
    distances = F.relu(1 - scores.gather(1, labels[:, None]) + scores)
    return mean((distances * (1 - F.one_hot(labels, 10))).sum(1) / 10)


def of_focal(model, batch, mean):
    return mean(focal_losses(model.scores(batch["pixel_values"]), batch["labels"]))


def of_smoothing(model, batch, mean):
    return mean(smoothed_losses(model.scores(batch["pixel_values"]), batch["labels"]))


def of_smoothing_by_head(model, batch, mean):
    return mean(smoothed_losses(model(batch["pixel_values"]).logits, batch["labels"]))


def of_weighted_samples(model, batch, mean):
    losses = negative_likelihoods(model.scores(batch["pixel_values"]), batch["labels"])
    return mean(batch["sample_weight"] * losses, batch["sample_weight"])


def of_products(model, batch, mean):
    losses = negative_likelihoods(model.scores(batch["pixel_values"]), batch["labels"])
    return mean((1 + batch["sample_weight"]) * losses)


# ---- the table ------------------------------------------------------------------------------------------------------


@dataclass
class Situation:
    """
    Args:
        model (`Callable`): Makes the model.
        rows (`Callable`): Makes the data.
        loss (`Callable`): `(model, batch, mean)` → the loss of a micro-batch, in plain PyTorch.
        share (`Callable`): `(step, batch)` → what the micro-batch counts for in its optimizer step.
        collator (`Callable`): Rows → batch.
        before (`type`): Overrides methods of `Trainer`.
        subclass (`bool`): Whether it does so in front of `TrimmingTrainer` rather than behind `TrimmingMixin`.
        loss_func, plain_loss_func (`Callable`): `compute_loss_func`, and what plain `Trainer` needs in its place.
        arguments (`dict`): More training arguments.
        exact (`bool`): Whether plain `Trainer` computes the same in the same order, to the last bit.
        has_loss (`bool`): Whether all of the logged loss passes through `TrimmingTrainer.training_step`.
        has_full_loss (`bool`): Whether all of the batch's loss is what one `compute_loss` returned, at any p.
    """

    model: Callable
    rows: Callable
    loss: Callable
    share: Callable = by_steps
    collator: Callable = default_data_collator
    before: type | None = None
    subclass: bool = False
    loss_func: Callable | None = None
    plain_loss_func: Callable | None = None
    arguments: dict = field(default_factory=dict)
    exact: bool = True
    has_full_loss: bool = True
    has_loss: bool = True

    def make(self):
        set_seed(0)
        return self.model()

    def settings(self, plain=False):
        """What `helpers.train` needs."""
        before = () if self.before is None else (self.before,)
        if plain:
            bases, loss_func = (*before, Trainer), self.plain_loss_func or self.loss_func
        else:
            bases = (*before, TrimmingTrainer) if self.subclass else (TrimmingMixin, *before, Trainer)
            loss_func = self.loss_func
        return {
            "trainer_cls": bases[0] if len(bases) == 1 else type("TheTrainer", bases, {}),
            "collator": self.collator,
            "trainer_kwargs": {"compute_loss_func": loss_func},
            "remove_unused_columns": False,  # labels that only a trainer uses
            **self.arguments,
        }

    def descend(self, model, batches, fractions):
        """
        Plain gradient descent as `helpers.train` does it, on `batches[epoch][step][micro-batch]`. Returns the loss of
        each step, and what it would have been at p = 1.
        """
        optimizer, losses, full_losses = torch.optim.SGD(model.parameters(), lr=0.1), [], []
        for fraction, steps in zip(fractions, batches, strict=True):
            for step in steps:
                losses.append(0.0), full_losses.append(0.0)
                for batch in step:
                    model.train()
                    share = self.share(step, batch)
                    loss = self.loss(model, batch, hardest_mean(fraction)) * share
                    full_loss = loss if fraction == 1 else self.loss(model, batch, hardest_mean(1.0)) * share
                    loss.backward()
                    losses[-1] += loss.item()
                    full_losses[-1] += full_loss.item()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step(), optimizer.zero_grad()
        return losses, full_losses


def vit(dropout=0.0):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_channels=1, num_labels=10, hidden_dropout_prob=dropout,
    )  # fmt: skip
    return ViTForImageClassification(config)


def llama():
    return LlamaForCausalLM(LlamaConfig(**LLAMA))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(**GPT2))


def question_answering():
    return BertForQuestionAnswering(BertConfig(**BERT))


def bert(**overrides):
    return BertForSequenceClassification(BertConfig(**BERT, num_labels=10, **overrides))


CLASSES = pixels(logits_only)
SMOOTHING = {"label_smoothing_factor": 0.1}

SITUATIONS = {
    # Models that no list has.
    "mse-dict": Situation(pixels(mse_dict, 1), regression, squared),
    "mse-tuple": Situation(pixels(mse_tuple, 1), regression, squared),
    "mse-kwargs-ignored": Situation(pixels(mse_with_kwargs, 1), regression, squared, undivided),
    "own-pretrained-model": Situation(lambda: OwnModel(OwnConfig()), classes, classified),
    "target-column": Situation(
        pixels(target_column), renamed, of_target_column, arguments={"label_names": ["target"]}
    ),
    "two-label-columns": Situation(
        pixels(two_tasks, 11), two_labels, of_two_tasks, arguments={"label_names": ["digit", "brightness"]}
    ),
    "two-images-a-sample": Situation(
        pixels(two_tasks_of_two_images, 11), two_labels, of_two_images, collator=two_images_each,
        arguments={"label_names": ["digit", "brightness"]},
    ),
    "no-labels": Situation(pixels(autoencoder, 64), images, of_autoencoder),
    "no-labels-summed": Situation(pixels(autoencoder_summed, 64), images, of_autoencoder_summed),
    "return-dict-false": Situation(lambda: bert(return_dict=False), short_texts, classified_by_head, undivided),
    "head-that-counts": Situation(vit, classes, classified_by_head, by_labels),
    "head-that-does-not-count": Situation(bert, short_texts, classified_by_head, undivided),
    "eval-mode": Situation(
        lambda: vit(dropout=0.3), classes, classified_in_eval_mode, by_labels, before=EvalMode
    ),
    # A loss in the trainer.
    "labels-left-in-head": Situation(vit, classes, classified_by_weight, undivided, before=LabelsLeft),
    "labels-left-subclass": Situation(
        vit, classes, classified_by_weight, undivided, before=LabelsLeft, subclass=True
    ),
    "labels-popped": Situation(CLASSES, classes, classified_by_weight, before=LabelsPopped),
    "labels-popped-subclass": Situation(
        CLASSES, classes, classified_by_weight, before=LabelsPopped, subclass=True
    ),
    "tuple-batch": Situation(
        pixels(bare_logits), classes, classified_tuples, collator=as_tuple, before=TupleBatch
    ),
    "two-passes": Situation(CLASSES, classes, classified_twice, before=TwoPasses),
    "two-passes-subclass": Situation(CLASSES, classes, classified_twice, before=TwoPasses, subclass=True),
    "adversarial": Situation(
        lambda: OwnModel(OwnConfig()), classes, attacked, before=Adversarial, has_full_loss=False
    ),
    "adversarial-subclass": Situation(
        lambda: OwnModel(OwnConfig()), classes, attacked, before=Adversarial, subclass=True, has_full_loss=False
    ),
    "second-loss": Situation(
        lambda: OwnModel(OwnConfig()), classes, classified_one_after_the_other, before=SecondLoss,
        has_full_loss=False,
    ),
    "second-loss-subclass": Situation(
        lambda: OwnModel(OwnConfig()), classes, classified_one_after_the_other, before=SecondLoss, subclass=True,
        has_full_loss=False, has_loss=False,
    ),
    "marked-in-trainer": Situation(CLASSES, classes, of_focal, before=MarkedLoss),
    # What the items are.
    "chunks": Situation(texts(in_chunks), tokens, of_tokens),
    "chunks-counted": Situation(texts(in_chunks_counted), tokens, of_tokens, by_labels),
    "same-targets": Situation(texts(same_targets), tokens, of_same_targets),
    "two-tasks-apart": Situation(
        pixels(tasks_apart), classes, of_tasks_apart, collator=either_task
    ),
    "missing-targets": Situation(pixels(masked_regression, 1), regression, of_those_labelled, collator=some_missing),
    "metric-in-forward": Situation(pixels(with_metric), classes, classified),
    "auxiliary-term": Situation(pixels(with_auxiliary_term), classes, of_auxiliary_term),
    # What a micro-batch counts for.
    "masked-prompts": Situation(texts(token_means), tokens, of_tokens, collator=some_prompts_masked),
    "masked-prompts-llama": Situation(
        llama, tokens, of_next_tokens, by_next_labels, collator=some_prompts_masked
    ),
    "masked-prompts-gpt2": Situation(
        gpt2, tokens, of_next_tokens, by_uncounted_next_labels, collator=some_prompts_masked
    ),
    "answers-outside": Situation(question_answering, questions, of_answers),
    "class-weights": Situation(pixels(weighted_classes), classes, classified_by_weight_inside),
    "class-weights-mean-func": Situation(
        CLASSES, classes, classified_by_weight, undivided, loss_func=weighted_mean
    ),
    "class-weights-sum-func": Situation(
        CLASSES, classes, classified_by_weight, by_class_weights, loss_func=weighted_sum
    ),
    "class-weights-counts-func": Situation(
        CLASSES, classes, classified_by_weight, by_labels, loss_func=weighted_losses,
        plain_loss_func=weighted_losses_plainly, exact=False,
    ),
    "samples-func": Situation(
        CLASSES, classes, of_focal, by_labels, loss_func=losses_of_samples,
        plain_loss_func=losses_of_samples_plainly, exact=False,
    ),
    "next-tokens-func": Situation(
        llama, tokens, of_next_tokens, by_next_labels, collator=some_prompts_masked, loss_func=losses_of_next,
        plain_loss_func=losses_of_next_plainly, exact=False,
    ),
    "next-tokens-flat-func": Situation(
        llama, tokens, of_next_tokens, by_next_labels, collator=some_prompts_masked, loss_func=losses_of_next_flat,
        plain_loss_func=losses_of_next_plainly, exact=False,
    ),
    "label-smoothing": Situation(vit, classes, of_smoothing_by_head, by_labels, arguments=SMOOTHING),
    "label-smoothing-own-model": Situation(
        lambda: OwnModel(OwnConfig()), classes, of_smoothing, arguments=SMOOTHING
    ),
    # Losses of other kinds, and by hand.
    "distillation": Situation(pixels(distillation), taught, of_distillation),
    "gaussian": Situation(pixels(gaussian, 2), regression, of_gaussian),
    "margin": Situation(pixels(margin), classes, of_margin),
    "marked-focal": Situation(pixels(marked_focal), classes, of_focal),
    "marked-smoothing": Situation(pixels(marked_smoothing), classes, of_smoothing),
    "marked-sample-weights": Situation(pixels(marked_samples), weighted_samples, of_weighted_samples),
    "marked-products": Situation(pixels(marked_products), weighted_samples, of_products),
    "marked-next-tokens": Situation(texts(marked_next), tokens, of_next_tokens),
    "marked-flat-tokens": Situation(texts(marked_flat), tokens, of_tokens),
}  # fmt: skip
if hasattr(F, "linear_cross_entropy"):  # torch 2.13
    SITUATIONS["linear-cross-entropy"] = Situation(pixels(linear_cross_entropy), classes, classified)
