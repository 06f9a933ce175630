"""Adaptive trimming: what is kept, and the training, against the rule written out in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import TrainerState

from hf_trim import TrimmingArguments
from hf_trim.trainer.arguments import TrimmingConfig
from hf_trim.trainer.batch import TrimmedBatch
from hf_trim.trainer.losses import _SIGNATURES, UNREDUCED
from hf_trim.trainer.mass_history import MassHistory
from hf_trim.trainer.selection import num_carrying
from tests.support.heads import HEADS, ctc, make, share
from tests.support.helpers import (
    descend,
    digit_texts,
    digits,
    grouped,
    relative_difference,
    tiny_bert,
    tiny_vit,
    train,
    weights,
)


ADAPTIVE = {"trim_schedule": "adaptive", "trim_mass": 0.7, "num_train_epochs": 2}


class Carry:
    """The fewest items with the largest mass: the rest has at most 0.3 of the batch's mass, or of the mean so far."""

    def __init__(self):
        self.means, self.step = {}, {}

    def __call__(self, losses, mass, group=0):
        """The sum of the kept losses, divided by n, and the kept part of the items."""
        n, past = len(losses), self.means.get(group, [])
        self.step.setdefault(group, []).append((mass.sum().item(), n))
        budget = (1 - 0.7) * max(mass.sum().item(), n * sum(past) / max(len(past), 1))
        by_loss = losses.detach().sort(descending=True, stable=True).indices  # where exp(−loss) is lost to rounding
        order = by_loss[mass[by_loss].sort(descending=True, stable=True).indices]
        count = next(k for k in range(1, n + 1) if k == n or mass[order[k:]].sum().item() <= budget)
        return losses[order[:count]].sum() / n, count / n

    def end_step(self):
        for group, sums in self.step.items():
            total, number = (sum(x) for x in zip(*sums, strict=True))
            self.means.setdefault(group, []).append(total / number)
        self.step = {}


def gradient_norm(losses_of, prediction):
    prediction = prediction.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(losses_of(prediction).sum(), prediction)
    return gradient.flatten(1).norm(dim=1) if gradient.dim() > 1 else gradient.abs()


def test_the_number_that_carries_a_share():
    mass = torch.tensor([0.1, 0.6, 0.1, 0.2])
    assert [num_carrying(mass, m) for m in (0.5, 0.6, 0.61, 0.8, 0.81, 1.0)] == [1, 1, 2, 2, 3, 4]
    assert num_carrying(torch.tensor([0.0, 1.0, 0.0]), 1.0) == 1
    # Of the mass of 3 that mini-batches so far had, 0.75 may be left out.
    assert num_carrying(mass, 0.75, least_total=3.0) == 1 and num_carrying(mass, 0.75, least_total=0.8) == 2
    assert num_carrying(torch.zeros(3), 0.9) == 1 and num_carrying(torch.zeros(0), 0.9) == 0


SHAPES = {
    F.cosine_embedding_loss: lambda x, y: (x, y, torch.ones(len(x))),
    F.margin_ranking_loss: lambda x, y: (x[:, 0], y[:, 0], torch.ones(len(x))),
    F.triplet_margin_loss: lambda x, y: (x, y, y.flip(0)),
    F.triplet_margin_with_distance_loss: lambda x, y: (x, y, y.flip(0)),
    F.gaussian_nll_loss: lambda x, y: (x, y, torch.full_like(x, 0.5)),
    F.multi_margin_loss: lambda x, y: (x, y.argmax(1)),
    F.multilabel_margin_loss: lambda x, y: (x, torch.stack([y.argmax(1), *[torch.full((len(x),), -1)] * 4], 1)),
    F.soft_margin_loss: lambda x, y: (x, y.sign()),
    F.hinge_embedding_loss: lambda x, y: (x, y.sign()),
    F.binary_cross_entropy: lambda x, y: (x.sigmoid(), y.sigmoid()),
    F.binary_cross_entropy_with_logits: lambda x, y: (x, (y > 0).float()),
    F.multilabel_soft_margin_loss: lambda x, y: (x, (y > 0).float()),
    F.kl_div: lambda x, y: (x.log_softmax(1), y.softmax(1)),
}
BY_ROWS = [func for func, unreduced in UNREDUCED.items() if unreduced.__name__ == "_row_losses"]


@pytest.mark.parametrize("func", BY_ROWS, ids=lambda func: func.__name__)
def test_the_mass_of_a_row_is_the_norm_of_its_gradient(func):
    torch.manual_seed(0)
    first, *rest = SHAPES.get(func, lambda x, y: (x, y))(torch.randn(8, 5), torch.randn(8, 5))
    bound = _SIGNATURES[func].bind(first, *rest, reduction="none")
    bound.apply_defaults()
    fields = UNREDUCED[func](func, bound.arguments, "mean")

    def losses_of(prediction):
        losses = func(prediction, *rest, reduction="none")
        return losses.flatten(1).mean(1) if losses.dim() > 1 else losses

    torch.testing.assert_close(fields["losses"], losses_of(first).reshape(-1))
    torch.testing.assert_close(fields["mass"](), gradient_norm(losses_of, first))


@pytest.mark.parametrize("options", [{}, {"weight": torch.linspace(0.5, 2.0, 5)}, {"label_smoothing": 0.1}], ids=str)
def test_the_mass_of_a_class_loss(options):
    torch.manual_seed(0)
    logits, target = 3 * torch.randn(200, 5), torch.randint(0, 5, (200,))
    target[::7] = -100
    bound = _SIGNATURES[F.cross_entropy].bind(logits, target, reduction="none", **options)
    bound.apply_defaults()
    mass = UNREDUCED[F.cross_entropy](F.cross_entropy, bound.arguments, "mean")["mass"]()
    valid = target != -100
    norm = gradient_norm(lambda x: F.cross_entropy(x, target, reduction="none", **options), logits)[valid]
    if options.get("label_smoothing"):
        assert torch.corrcoef(torch.stack([mass[valid], norm]))[0, 1] > 0.8
        best = torch.log(torch.full((1, 5), 0.02).index_fill(1, torch.tensor([3]), 0.92))  # the target's probabilities
        bound.arguments.update(input=best, target=torch.tensor([3]))
        assert UNREDUCED[F.cross_entropy](F.cross_entropy, bound.arguments, "mean")["mass"]().item() < 1e-6
        return
    scale = options["weight"][target[valid]] if "weight" in options else 1
    torch.testing.assert_close(mass[valid], scale * (1 - logits.softmax(1)[valid, target[valid]]))
    assert (mass[valid] <= norm * (1 + 1e-5)).all() and (norm <= 2**0.5 * mass[valid] * (1 + 1e-5)).all()


# ---- trainings ------------------------------------------------------------------------------------------------------


def class_items(outputs, batch):
    losses = F.cross_entropy(outputs.logits, batch["labels"], reduction="none")
    return losses, 1 - torch.exp(-losses.detach())


def multi_label_items(outputs, batch):
    def losses_of(logits):
        return F.binary_cross_entropy_with_logits(logits, batch["labels"], reduction="none").mean(1)

    return losses_of(outputs.logits), gradient_norm(losses_of, outputs.logits)


def regression_items(outputs, batch):
    losses = (outputs.logits[:, 0] - batch["labels"]) ** 2
    return losses, 2 * losses.detach().sqrt()


TASKS = {"single": class_items, "multi": multi_label_items, "regression": regression_items}


@pytest.mark.parametrize("backward", ["auto", "dense", "replay"])
@pytest.mark.parametrize("task", TASKS)
def test_samples_follow_the_rule(task, backward, tmp_path):
    ours = train(tiny_vit(task), digits(43, task), tmp_path, trim_backward=backward, **ADAPTIVE)
    reference, kept, carry = tiny_vit(task), [], Carry()

    def loss_of(batch):
        loss, fraction = carry(*TASKS[task](reference(batch["pixel_values"]), batch))
        carry.end_step()
        kept.append(fraction)
        return loss

    logged = descend(reference, ours.batches, loss_of)
    assert ours.losses == pytest.approx(logged, rel=1e-5)
    start = weights(tiny_vit(task))
    assert relative_difference(weights(ours) - start, weights(reference) - start) < 1e-5
    logs = ours.state.log_history[:-1]
    assert [log["kept_fraction"] for log in logs] == pytest.approx(kept)
    assert all(log["keep_fraction"] == log["kept_fraction"] and 0 < log["kept_mass"] <= 1 for log in logs)
    assert logs[0]["kept_mass"] >= 0.7 - 1e-6
    assert min(kept) < 0.9


def test_near_convergence_an_average_of_the_training_so_far_decides():
    """All losses are small and alike: a share of their own mass would keep most of them."""
    config = TrimmingConfig(trim_schedule="adaptive", trim_mass=0.9)
    mass = torch.tensor([0.02, 0.019, 0.018, 0.017])
    for means, count in (([], 4), ([0.1], 2), ([0.4], 1), ([0.01, 0.4], 4)):  # of the first group of items
        batch = TrimmedBatch(config, 0.9, 4, False, mean_masses=means)
        assert batch.choose(mass, mass, torch.ones(4, dtype=torch.bool), most=4)[0].sum() == count


def test_the_average_is_over_steps_and_part_of_the_trainers_state(tmp_path):
    state, history = TrainerState(), MassHistory()
    accelerator = Accelerator(cpu=True)
    assert history.means(state) == []
    for step in ([(3.0, 4.0), (1.0, 4.0)], [(1.0, 2.0)], []):  # mini-batches: mass and number of items
        for sums in step:
            batch = TrimmedBatch(TrimmingConfig(), 1.0, 4, False)
            batch.masses = [torch.tensor(sums), torch.tensor([1.0, 0.0])]  # the second group has no item
            history.add(batch)
        history.end_step(state, accelerator)
    assert history.means(state) == [0.5, 0.0]
    state.save_to_json(str(tmp_path / "state.json"))
    assert MassHistory().means(TrainerState.load_from_json(str(tmp_path / "state.json"))) == [0.5, 0.0]


def head_items(head, outputs, batch):
    if head == "question-answering":
        return [HEADS[head][2](outputs, batch)[0]], [
            sum(
                1
                - torch.exp(-F.cross_entropy(outputs[f"{name}_logits"], batch[f"{name}_positions"], reduction="none"))
                for name in ("start", "end")
            )
        ]
    losses = HEADS[head][2](outputs, batch)
    if head == "ctc":
        return losses, [1 - torch.exp(-ctc(outputs, batch)[0] * (batch["labels"] >= 0).sum(1))]
    return losses, [1 - torch.exp(-x) for x in losses]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("head", ["llama", "masked-lm", "token-classification", "question-answering", "ctc", "bart"])
def test_heads_follow_the_rule(head, accumulate, tmp_path):
    arguments = {**ADAPTIVE, "num_train_epochs": 1, "gradient_accumulation_steps": accumulate}
    ours = train(make(head), HEADS[head][1](), tmp_path, **arguments)
    reference, carry = make(head), Carry()

    def loss_of(step):
        total = 0.0
        for batch in step:
            losses, masses = head_items(head, reference(**batch), batch)
            groups = enumerate(zip(losses, masses, strict=True))
            parts = [carry(x, mass.detach(), number)[0] for number, (x, mass) in groups]
            total = total + sum(parts) * share(head, reference, batch, step)
        carry.end_step()
        return total

    logged = descend(reference, grouped(ours.batches, 1, accumulate)[0], loss_of)
    assert ours.losses == pytest.approx(logged, rel=1e-5)
    start = weights(make(head))
    assert relative_difference(weights(ours) - start, weights(reference) - start) < 1e-4


def test_texts_are_ranked_by_the_mean_mass_of_their_tokens(tmp_path):
    rows = HEADS["token-classification"][1]()
    ours = train(make("token-classification"), rows, tmp_path, trim_unit="sample", **ADAPTIVE)
    reference, means = make("token-classification"), []

    def loss_of(batch):
        labels = batch["labels"]
        losses = F.cross_entropy(
            reference(batch["input_ids"], batch["attention_mask"]).logits.transpose(1, 2), labels, reduction="none"
        )
        valid = labels != -100
        mass = ((1 - torch.exp(-losses.detach())) * valid).sum(1) / valid.sum(1)
        order = mass.sort(descending=True, stable=True).indices
        budget = 0.3 * max(mass.sum(), len(mass) * sum(means) / max(len(means), 1))
        means.append(mass.mean())
        return losses[order[: int((mass[order].flip(0).cumsum(0) > budget).sum())]].sum() / valid.sum()

    assert ours.losses == pytest.approx(descend(reference, ours.batches, loss_of), rel=1e-5)


def test_the_chunked_head_keeps_the_same(tmp_path, monkeypatch):
    rows = HEADS["llama"][1]()
    whole = train(make("llama"), rows, tmp_path, trim_backward="dense", **ADAPTIVE)
    monkeypatch.setattr("hf_trim.trainer.lm_head.MIN_VOCABULARY", 8)
    chunked = train(make("llama"), rows, tmp_path, **ADAPTIVE)
    assert chunked.losses == pytest.approx(whole.losses, rel=1e-5)
    assert relative_difference(weights(chunked), weights(whole)) < 1e-5


@pytest.mark.parametrize("select", ["hardest", "random"])
def test_resuming_changes_nothing(select, tmp_path):
    arguments = {**ADAPTIVE, "save_strategy": "steps", "save_steps": 4, "trim_select": select}
    whole = train(tiny_bert(dropout=0.2), digit_texts(), tmp_path, **arguments)
    resumed = train(
        tiny_bert(dropout=0.2), digit_texts(), tmp_path, resume=str(tmp_path / "checkpoint-8"), **arguments
    )
    assert resumed.losses == whole.losses[8:]
    assert torch.equal(weights(resumed), weights(whole))


def test_restored_callbacks_are_not_reported_as_missing(tmp_path, caplog):
    arguments = {
        **ADAPTIVE,
        "save_strategy": "steps",
        "save_steps": 4,
        "restore_callback_states_from_checkpoint": True,
    }
    whole = train(tiny_vit(), digits(), tmp_path, **arguments)
    resumed = train(tiny_vit(), digits(), tmp_path, resume=str(tmp_path / "checkpoint-8"), **arguments)
    assert "Ignoring" not in caplog.text
    assert resumed.losses == whole.losses[8:] and torch.equal(weights(resumed), weights(whole))


def test_single_samples_of_a_step_are_chosen_by_their_mass(tmp_path):
    arguments = {**ADAPTIVE, "trim_backward": "replay"}
    single = train(
        tiny_vit(), digits(), tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8, **arguments
    )
    whole = train(tiny_vit(), digits(), tmp_path, **arguments)
    assert single.losses == pytest.approx(whole.losses, rel=1e-5)
    assert relative_difference(weights(single), weights(whole)) < 1e-5
    for ours, theirs in zip(single.state.log_history[:-1], whole.state.log_history[:-1], strict=True):
        assert ours["kept_fraction"] == pytest.approx(theirs["kept_fraction"])
        assert ours["kept_mass"] == pytest.approx(theirs["kept_mass"], rel=1e-5)


def test_settings_that_have_no_effect_are_refused(tmp_path):
    for arguments, match in (
        ({"trim_mass": 0.9}, "trim_mass=0.9 has no effect with trim_schedule='epoch'"),
        ({"trim_schedule": "adaptive", "trim_keep_end": 0.5}, "trim_keep_end=0.5 has no effect with .*'adaptive'"),
        ({"trim_schedule": "adaptive", "trim_mass": 1.5}, "trim_mass must be a fraction"),
    ):
        with pytest.raises(ValueError, match=match):
            TrimmingArguments(str(tmp_path), **arguments)


def test_all_of_the_mass_is_plain_training(tmp_path):
    plain = train(tiny_vit(), digits(), tmp_path, trim_select="none")
    ours = train(tiny_vit(), digits(), tmp_path, trim_schedule="adaptive", trim_mass=1.0)
    assert ours.losses == plain.losses and torch.equal(weights(ours), weights(plain))
