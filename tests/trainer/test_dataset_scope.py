"""`trim_scope="dataset"`: which samples an epoch has, its steps and learning rate, resuming, and what is refused."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, WeightedRandomSampler
from transformers import TrainerCallback, default_data_collator

from hf_trim import TrimmingArguments, TrimmingTrainer
from hf_trim.trainer.dataset_scope import choose_hardest, count_samples, dataset_fractions
from tests.support.helpers import digits, tiny_vit, train, weights


ROWS, EPOCHS = 67, 5  # mini-batches of 8, and of a whole epoch a last one of 3
SCOPE = {"trim_scope": "dataset", "num_train_epochs": EPOCHS}
COUNTS = [67, 48, 32, 16, 67]  # p = 1, 0.73, 0.47, 0.2, 1, in whole mini-batches


def numbered(count=ROWS):
    """Rows that say which one they are."""
    return [{**row, "place": i} for i, row in enumerate(digits(count))]


class Noting(TrimmingTrainer):
    """Notes of each epoch the samples, in order, and the losses that were remembered at its start."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.drawn, self.known = [], []

    def _run_epoch(self, **kwargs):
        self.drawn.append([])
        self.known.append(self.trim_memory.columns["last_loss"].copy())
        super()._run_epoch(**kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            self.drawn[-1] += inputs["place"].tolist()
        return super().compute_loss(model, {k: v for k, v in inputs.items() if k != "place"}, *args, **kwargs)


class Steps(TrainerCallback):
    def __init__(self):
        self.rates = []

    def on_step_end(self, args, state, control, **kwargs):
        self.rates.append((state.global_step, state.epoch, kwargs["lr_scheduler"].get_last_lr()[0]))


def by_hand(count, losses, seen, epoch, refresh):
    """Those that were not seen for longest come back first; then the hardest."""
    order = sorted(range(len(losses)), key=lambda i: -losses[i])
    overdue = sorted((i for i in order if epoch - seen[i] > refresh), key=lambda i: seen[i])[: count // 2]
    others = [i for i in order if i not in overdue]
    return sorted(overdue + others[: count - len(overdue)])


@pytest.mark.parametrize("refresh", [1, 3])
def test_each_epoch_has_the_hardest_samples(refresh, tmp_path):
    trainer = train(tiny_vit(), numbered(), tmp_path, trainer_cls=Noting, trim_refresh=refresh, **SCOPE)
    assert [len(drawn) for drawn in trainer.drawn] == COUNTS
    seen = np.zeros(ROWS, int)
    for epoch, (drawn, losses) in enumerate(zip(trainer.drawn, trainer.known, strict=True)):
        assert len(set(drawn)) == len(drawn) and drawn != sorted(drawn)
        assert sorted(drawn) == by_hand(COUNTS[epoch], losses.tolist(), seen, epoch, refresh)
        seen[drawn] = epoch
    table = trainer.trim_memory.to_dict()
    assert table["seen"].tolist() == [sum(i in drawn for drawn in trainer.drawn) for i in range(ROWS)]


def test_steps_learning_rate_and_logs_follow_the_plan(tmp_path):
    steps, batches = Steps(), [9, 6, 4, 2, 9]
    trainer = train(
        tiny_vit(), digits(ROWS), tmp_path, callbacks=[steps], lr_scheduler_type="linear", logging_strategy="epoch",
        gradient_accumulation_steps=2, **SCOPE,
    )  # fmt: skip
    ends = np.cumsum([math.ceil(n / 2) for n in batches]).tolist()
    assert trainer.state.global_step == trainer.state.max_steps == ends[-1]
    assert [step for step, epoch, _ in steps.rates if epoch == int(epoch)] == ends
    np.testing.assert_allclose([rate for *_, rate in steps.rates], [0.1 * (1 - s / ends[-1]) for s, *_ in steps.rates])
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["keep_fraction"] for log in logs] == pytest.approx([1, 0.7333, 0.4667, 0.2, 1], rel=1e-3)
    assert [log["kept_fraction"] for log in logs] == pytest.approx([n / ROWS for n in COUNTS])
    assert not any("full_loss" in log for log in logs)
    speed = trainer.state.log_history[-1]
    assert speed["train_samples_per_second"] * speed["train_runtime"] == pytest.approx(sum(COUNTS), rel=0.02)


def test_a_training_is_that_of_a_loop(tmp_path):
    """The same samples in the same order, with plain steps of SGD."""
    model, rows = tiny_vit(), numbered()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = train(model, rows, tmp_path, trainer_cls=Noting, **SCOPE)
    by_loop = tiny_vit()
    by_loop.load_state_dict(start)
    by_loop.train()
    for drawn in trainer.drawn:
        for at in range(0, len(drawn), 8):
            batch = default_data_collator(
                [{k: rows[i][k] for k in rows[i] if k != "place"} for i in drawn[at : at + 8]]
            )
            by_loop(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(by_loop.parameters(), 1.0)
            with torch.no_grad():
                for p in by_loop.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
    torch.testing.assert_close(weights(by_loop), weights(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [4, 9, 13, 19])  # in the first epoch, at its end, in the second, in the third
def test_resuming_gives_the_same_training(step, tmp_path):
    options = {**SCOPE, "save_strategy": "steps", "save_steps": step, "trim_select": "hardest"}
    whole = train(tiny_vit(), numbered(), tmp_path / "a", trainer_cls=Noting, **options)
    again = train(
        tiny_vit(seed=5), numbered(), tmp_path / "b", trainer_cls=Noting, **options,
        resume=str(tmp_path / "a" / f"checkpoint-{step}"),
    )  # fmt: skip
    assert again.drawn[-1] == whole.drawn[-1] and again.state.global_step == whole.state.global_step
    assert torch.equal(weights(again.model), weights(whole.model))
    assert again.trim_memory.to_dict()["seen"].tolist() == whole.trim_memory.to_dict()["seen"].tolist()


def test_random_parts_are_as_large(tmp_path):
    trainer = train(tiny_vit(), numbered(), tmp_path, trainer_cls=Noting, trim_select="random", **SCOPE)
    assert [len(drawn) for drawn in trainer.drawn] == COUNTS
    hardest = by_hand(COUNTS[3], trainer.known[3].tolist(), np.full(ROWS, 2), 3, 3)
    assert len(set(trainer.drawn[3]) - set(hardest)) > 5 and len(set(trainer.drawn[2]) - set(trainer.drawn[1])) > 2


def test_numbers_of_the_plan():
    assert dataset_fractions(0.5, 0.5, 4) == [1, 0.5, 0.5, 1]
    assert dataset_fractions(1.0, 0.2, 3) == [1, 0.2, 1] and dataset_fractions(1.0, 0.2, 4) == [1, 0.6, 0.2, 1]
    assert dataset_fractions(1.0, 0.4, 10)[-4:] == pytest.approx([1 - 6 * 0.6 / 7, 0.4, 1, 1])
    assert [count_samples(p, 100, 32) for p in (1, 0.9, 0.6, 0.01)] == [100, 96, 64, 32]
    assert count_samples(0.5, 20, 32) == 20  # there is no full mini-batch
    losses = np.array([1.0, np.nan, 3.0, 0.5])
    assert choose_hardest(2, losses, np.array([4, 4, 4, 4]), 5, 3).tolist() == [1, 2]
    assert choose_hardest(2, losses, np.array([4, 4, 4, 0]), 5, 3).tolist() == [1, 3]
    assert choose_hardest(2, losses, np.array([1, 4, 4, 0]), 5, 3).tolist() == [1, 3]  # at most half come back


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 5}, "max_steps is 5: give num_train_epochs"),
        ({"num_train_epochs": 2.5}, "a whole number of epochs from 3 on"),
        ({"num_train_epochs": 2}, "num_train_epochs is 2"),
        ({"train_sampling_strategy": "sequential"}, "SequentialSampler would do so too"),
    ],
)
def test_trainings_that_have_no_such_epochs_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tiny_vit(), digits(16), tmp_path, **{**SCOPE, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trim_schedule": "adaptive"}, "trim_schedule='adaptive' has no effect with trim_scope='dataset'"),
        ({"trim_skip_hardest": 0.1}, "trim_skip_hardest=0.1 has no effect"),
        ({"trim_backward": "sparse"}, "trim_backward='sparse' has no effect"),
        ({"trim_refresh": 0}, "trim_refresh must be a number of epochs from 1 on, and is 0"),
        ({"trim_scope": "local", "trim_refresh": 2}, "trim_refresh=2 has no effect with trim_scope='local'"),
    ],
)
def test_settings_without_effect_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TrimmingArguments(str(tmp_path), **{"trim_scope": "dataset", **options})


@pytest.mark.parametrize("trim_memory", [False, True])
def test_a_checkpoint_of_another_scope_is_refused(trim_memory, tmp_path):
    train(tiny_vit(), digits(24), tmp_path, save_strategy="epoch", trim_memory=trim_memory)
    with pytest.raises(ValueError, match="was written without trim_scope='dataset'"):
        train(tiny_vit(), digits(24), tmp_path / "b", **SCOPE, resume=str(tmp_path / "checkpoint-3"))


def test_nothing_left_out_is_plain_training(tmp_path):
    options = {"num_train_epochs": 2, "trim_keep_end": 1.0}
    trained = [
        train(tiny_vit(), digits(24), tmp_path / scope, trim_scope=scope, **options) for scope in ("local", "dataset")
    ]
    assert torch.equal(*[weights(trainer.model) for trainer in trained])


class Loader(TrimmingTrainer):
    """Mini-batches of 16, in an order of its own or not."""

    shuffle = False

    def get_train_dataloader(self):
        order = {"shuffle": True} if self.shuffle else {"sampler": self._get_train_sampler()}
        return self.accelerator.prepare(
            DataLoader(self.train_dataset, batch_size=16, collate_fn=self.data_collator, **order)
        )


class Shuffling(Loader):
    shuffle = True


class Sampling(TrimmingTrainer):
    def _get_train_sampler(self, *args):
        return WeightedRandomSampler(torch.ones(ROWS), ROWS)


@pytest.mark.parametrize("trainer_cls", [Shuffling, Sampling])
def test_an_order_of_samples_of_its_own_is_refused(trainer_cls, tmp_path):
    with pytest.raises(ValueError, match="RandomSampler would do so too"):
        train(tiny_vit(), digits(ROWS), tmp_path, trainer_cls=trainer_cls, **SCOPE)


def test_the_plan_has_the_mini_batches_of_the_data_loader(tmp_path):
    steps = Steps()
    options = {"callbacks": [steps], "lr_scheduler_type": "linear", **SCOPE}
    trainer = train(tiny_vit(), digits(ROWS), tmp_path, trainer_cls=Loader, **options)
    assert trainer.state.global_step == trainer.state.max_steps == 5 + 3 + 2 + 1 + 5
    assert steps.rates[-1][2] == 0
    assert trainer.trim_memory.to_dict()["seen"].sum() == 67 + 48 + 32 + 16 + 67


class Looking(Noting):
    """Looks at the data at the end of each epoch."""

    def _run_epoch(self, **kwargs):
        super()._run_epoch(**kwargs)
        next(iter(self.get_train_dataloader()))


def test_a_look_at_the_data_during_training_changes_nothing(tmp_path):
    trainer = train(tiny_vit(), numbered(), tmp_path, trainer_cls=Looking, **SCOPE)
    assert [len(drawn) for drawn in trainer.drawn] == COUNTS
    assert trainer.trim_memory.to_dict()["seen"].sum() == sum(COUNTS)


def test_data_of_one_mini_batch_are_refused(tmp_path):
    with pytest.raises(ValueError, match="with 6 samples in mini-batches of 8 each epoch would have all samples"):
        train(tiny_vit(), digits(6), tmp_path, **SCOPE)


@pytest.mark.parametrize("changed", [{"num_train_epochs": 6}, {"trim_keep_end": 0.6}])
def test_resuming_with_other_epochs_is_refused(changed, tmp_path):
    train(tiny_vit(), digits(24), tmp_path, save_strategy="epoch", **{**SCOPE, "num_train_epochs": 3})
    with pytest.raises(ValueError, match=r"is of a training whose epochs have \[24, 8, 24\] samples"):
        options = {**SCOPE, "num_train_epochs": 3, **changed}
        train(tiny_vit(), digits(24), tmp_path / "b", resume=str(tmp_path / "checkpoint-3"), **options)


def test_messages_name_the_scope(tmp_path):
    with pytest.raises(ValueError, match="trim_scope='dataset' need each process to load its own samples"):
        train(tiny_vit(), digits(24), tmp_path, accelerator_config={"dispatch_batches": True}, **SCOPE)
