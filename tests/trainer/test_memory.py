"""The memory of losses: each loss belongs to its sample, whatever brings the samples to the model."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset, Subset, WeightedRandomSampler
from transformers import DataCollatorWithFlattening, TrainerCallback, default_data_collator

from hf_trim import TrimmingArguments, TrimmingTrainer
from hf_trim.trainer.memory import COLUMNS, FILE, HISTORY_BYTES, SampleMemory
from tests.support.heads import HEADS, make
from tests.support.helpers import digit_texts, digits, tiny_bert, tiny_vit, train, weights


ROWS = 43  # mini-batches of 8, and a last one of 3
STILL = {"learning_rate": 0.0, "trim_memory": True}  # each sample has the same loss whenever it is seen


def own_losses(model, rows):
    """The loss of each sample alone; of a text the mean over its tokens."""
    model.eval()
    with torch.no_grad():
        batches = [default_data_collator([row]) for row in rows]
        return [float(model(**batch).loss) for batch in batches]


def remember(model, rows, folder, **arguments):
    """Train with a learning rate of 0; returns the trainer, and the table."""
    trainer = train(model, rows, folder, **{**STILL, **arguments})
    return trainer, trainer.trim_memory.to_dict()


def assert_right(table, losses, epochs=2):
    assert table["index"].tolist() == list(range(len(losses)))
    assert table["seen"].tolist() == [epochs] * len(losses)
    for name in ("last_loss", "mean_loss"):
        np.testing.assert_allclose(table[name], losses, rtol=2e-5, atol=1e-6)
    assert table["loss_std"].max() < 1e-3
    assert len(set(np.round(losses, 4))) > len(losses) * 0.8  # or a wrong order would not show


class Weighted(TrimmingTrainer):
    """Draws some samples often and others never."""

    def _get_train_sampler(self, *args):
        generator = torch.Generator().manual_seed(0)
        return WeightedRandomSampler([i % 3 for i in range(ROWS)], ROWS, generator=generator)


class OwnLoader(TrimmingTrainer):
    """A data loader by hand, and steps of its own."""

    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, 8, shuffle=True, collate_fn=self.data_collator)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return [next(epoch_iterator) for _ in range(num_batches)], None


def as_pairs(rows):
    """A collator whose mini-batches are no dictionaries."""
    batch = default_data_collator(rows)
    return batch["pixel_values"], batch["labels"]


class Pairs(TrimmingTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        images, labels = inputs
        return torch.nn.functional.cross_entropy(model(images).logits, labels)


def with_columns(rows):
    """A data set of the Hub's kind, one of whose columns the model does not take."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return Dataset.from_dict({**columns, "number": list(range(len(rows)))[::-1]}).with_format("torch")


IMAGES = {
    "a short last mini-batch": {},
    "workers, accumulated": {"dataloader_num_workers": 2, "gradient_accumulation_steps": 4},
    "columns that are removed": {"rows": with_columns, "remove_unused_columns": True},
    "a data loader of the user's": {"trainer_cls": OwnLoader},
    "no dictionaries": {"trainer_cls": Pairs, "collator": as_pairs},
    "plain training": {"trim_select": "none"},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "adaptive": {"trim_schedule": "adaptive", "trim_mass": 0.5},
    "replay": {"trim_backward": "replay"},
    "another score": {"trainer_kwargs": {"trim_score": lambda outputs, inputs, losses: -losses}},
    "smoothed": {"label_smoothing_factor": 0.1, "trim_keep_end": 1.0},
}
MARKS = dict.fromkeys(("compiled", "adaptive", "another score"), pytest.mark.extended)


@pytest.mark.parametrize("case", [pytest.param(case, marks=MARKS.get(case, [])) for case in IMAGES])
def test_each_loss_belongs_to_its_sample(case, tmp_path):
    arguments = dict(IMAGES[case])
    rows = digits(ROWS)
    given = arguments.pop("rows", list)(rows)
    trainer, table = remember(tiny_vit(), given, tmp_path, **arguments)
    if case == "smoothed":
        model = tiny_vit().eval().requires_grad_(False)
        logits = [model(row["pixel_values"][None]).logits for row in rows]
        targets = [torch.tensor([row["labels"]]) for row in rows]
        cross_entropy = torch.nn.functional.cross_entropy
        losses = [float(cross_entropy(*pair, label_smoothing=0.1)) for pair in zip(logits, targets, strict=True)]
    else:
        losses = own_losses(tiny_vit(), rows)
        np.testing.assert_allclose(table["confidence"], np.exp(-np.array(losses)), rtol=1e-4)
    assert_right(table, losses)
    assert table["label"].tolist() == [row["labels"] for row in rows]
    predicted = tiny_vit().eval()(torch.stack([row["pixel_values"] for row in rows])).logits.argmax(-1)
    assert table["prediction"].tolist() == predicted.tolist()
    assert table["is_right"].tolist() == (predicted == torch.tensor([row["labels"] for row in rows])).tolist()
    logged = [log["kept_fraction"] for log in trainer.state.log_history if "kept_fraction" in log]
    assert (0 < table["kept"].sum() < 2 * ROWS) == (min(logged) < 1)
    assert (table["kept"] <= table["seen"]).all()


def test_samples_are_counted_as_they_are_drawn_and_kept(tmp_path):
    trainer, table = remember(
        tiny_vit(), digits(ROWS), tmp_path, trainer_cls=Weighted, trim_keep_start=0.25, trim_keep_end=0.25
    )
    assert table["seen"].sum() == 2 * ROWS
    assert all(seen == 0 for seen in table["seen"][::3]) and table["seen"].max() > 2
    assert np.isnan(table["mean_loss"]).tolist() == (table["seen"] == 0).tolist()
    assert table["kept"].sum() == 2 * (5 * 2 + 1)  # of each 8, and of 3
    losses = np.nan_to_num(table["mean_loss"])
    assert np.average(losses, weights=table["kept"]) > np.average(losses, weights=table["seen"])
    for row in trainer.hard_examples(3, by="kept"):
        assert row["kept"] == max(trainer.trim_memory.columns["kept"]) or row["kept"] > 0


TEXTS = {
    "bert": {"train_sampling_strategy": "group_by_length"},
    "llama": {"trim_keep_start": 0.5, "trim_keep_end": 0.5},  # tokens
    "masked-lm": {"trim_unit": "sample", "gradient_accumulation_steps": 2},
    "question-answering": {"trim_select": "none"},
    "pretraining": {"trim_select": "none"},  # two losses, each a mean over its own items
}


@pytest.mark.parametrize("head", TEXTS)
def test_losses_of_texts_are_means_over_their_tokens(head, tmp_path):
    if head == "bert":
        model, rows = tiny_bert(dropout=0.0), digit_texts(ROWS)
        model.classifier.weight.data *= 1000  # losses that differ
    else:
        model, rows = make(head), HEADS[head][1]()[:ROWS]
    losses = own_losses(model, rows)
    losses = [loss / 2 for loss in losses] if head == "pretraining" else losses  # the sum, and the mean
    _, table = remember(model, rows, tmp_path, **TEXTS[head])
    assert_right(table, losses)
    if head == "llama":  # half of the tokens of a mini-batch
        assert 0.3 < table["kept"].sum() / (2 * len(rows)) < 0.7 and len(set(table["kept"].tolist())) > 5
        assert "label" not in table


def test_accumulated_mini_batches_of_one_sample(tmp_path):
    arguments = {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "trim_backward": "replay",
        "trim_keep_start": 0.25, "trim_keep_end": 0.25,
    }  # fmt: skip
    rows = digits(12)
    _, table = remember(tiny_vit(), rows, tmp_path, **arguments)
    assert_right(table, own_losses(tiny_vit(), rows))
    assert table["kept"].sum() == 2 * 3


def test_a_training_that_is_remembered_is_the_same(tmp_path):
    for arguments in ({"trim_select": "none"}, {}):
        ours = train(tiny_vit(dropout=0.1), digits(ROWS), tmp_path, trim_memory=True, **arguments)
        plain = train(tiny_vit(dropout=0.1), digits(ROWS), tmp_path, **arguments)
        assert ours.losses == plain.losses and torch.equal(weights(ours), weights(plain))
        for batch, other in zip(ours.batches, plain.batches, strict=True):  # what the collator saw
            assert batch.keys() == other.keys() and torch.equal(batch["pixel_values"], other["pixel_values"])
    loader = ours.get_train_dataloader()
    assert "labels" in next(iter(loader))
    assert ours.trim_memory.to_dict()["seen"].tolist() == [2] * ROWS  # which that loader does not change


class Looks(TrainerCallback):
    """Draws mini-batches by itself, as callbacks do that log samples."""

    def __init__(self):
        self.keys, self.lengths = set(), set()

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.keys.add(tuple(sorted(next(iter(train_dataloader)))))
        self.lengths.add((len(train_dataloader), len(train_dataloader.dataset)))

    on_epoch_begin = on_train_begin


def test_callbacks_see_ordinary_mini_batches(tmp_path):
    rows, looks = digits(ROWS), Looks()
    train(tiny_vit(), rows, tmp_path, trim_memory=True, callbacks=[looks])
    assert looks.keys == {("labels", "pixel_values")} and looks.lengths == {(6, ROWS)}


def test_statistics_are_those_of_all_losses():
    memory, losses = SampleMemory(4, 3), [[3.0, 1.0, 2.0], [0.5, 0.5, 4.0], [math.nan, 1.0, 1.0]]
    for epoch in range(3):
        index = np.array([2, 0, 1] if epoch else [0, 1, 2])
        values = np.array([[losses[i][epoch], i, 0.5, 1, i] for i in index]).T
        memory.update(index, np.full(3, epoch), values)
    table = memory.to_dict()
    assert table["seen"].tolist() == [3, 3, 2, 0]
    np.testing.assert_allclose(table["mean_loss"], [2, 5 / 3, 1, math.nan], rtol=1e-6)
    np.testing.assert_allclose(table["loss_std"], [np.std(losses[0]), np.std(losses[1]), 0, math.nan], rtol=1e-5)
    assert table["last_loss"].tolist()[:3] == [2.0, 4.0, 1.0]
    assert [row["index"] for row in memory.hardest(9)] == [0, 1, 2]  # never the one that was not seen
    assert [row["index"] for row in memory.hardest(9, "last_loss")] == [1, 0, 2]
    assert [row["index"] for row in memory.hardest(9, "label_error")] == [0, 2, 1]
    assert [row["losses"] for row in memory.hardest(2)] == [[3.0, 1.0, 2.0], [0.5, 0.5, 4.0]]
    assert Dataset.from_list(memory.hardest(2))["is_right"][:] == [False, True]
    assert Dataset.from_dict(memory.to_dict())[2]["seen"] == 2
    assert memory.to_pandas().shape == (4, 11)


def test_a_sample_that_is_there_twice_counts_twice():
    one, other = SampleMemory(2), SampleMemory(2)
    values = np.array([[1.0, 1, 0.5, 0, 0], [2.0, 1, 0.5, 0, 0], [4.0, 0, 0.5, 0, 0]]).T
    one.update(np.array([1, 0, 1]), np.zeros(3, int), values)
    for place, index in enumerate([1, 0, 1]):
        other.update(np.array([index]), np.zeros(1, int), values[:, place : place + 1])
    assert one.to_dict()["mean_loss"].tolist() == other.to_dict()["mean_loss"].tolist() == [2.0, 2.5]


def test_bytes_of_a_sample():
    size = 10**6
    with_history, without = SampleMemory(size, 30), SampleMemory(size, 31)
    assert without.nbytes == 34 * size
    assert with_history.nbytes == 34 * size + HISTORY_BYTES
    assert 10 * without.nbytes + HISTORY_BYTES <= 400e6
    assert sum(np.dtype(kind).itemsize for kind in COLUMNS.values()) == 34


@pytest.mark.parametrize("step", [4, pytest.param(8, marks=pytest.mark.extended)])  # in the midst of epochs of 6
@pytest.mark.extended
def test_resuming_gives_the_same_table(step, tmp_path):
    arguments = {
        "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4, "trim_memory": True, "logging_steps": 3,
        "dataloader_num_workers": 2 if step == 4 else 0,
    }  # fmt: skip
    whole = train(tiny_vit(dropout=0.2), digits(ROWS), tmp_path, **arguments)
    checkpoint = tmp_path / f"checkpoint-{step}"
    assert [path.name for path in checkpoint.glob("*memory*")] == [FILE]  # no part of a file
    resumed = train(tiny_vit(dropout=0.2), digits(ROWS), tmp_path, resume=str(checkpoint), **arguments)
    assert torch.equal(weights(resumed), weights(whole))
    for name, column in whole.trim_memory.columns.items():
        assert column.tobytes() == resumed.trim_memory.columns[name].tobytes(), name
    assert whole.trim_memory.history.tobytes() == resumed.trim_memory.history.tobytes()
    assert not np.isnan(whole.trim_memory.history).any()

    if step == 4:
        with pytest.raises(ValueError, match="remembers 43 samples, and the training data set has 40"):
            train(tiny_vit(), digits(40), tmp_path, resume=str(checkpoint), **arguments)
        (checkpoint / FILE).unlink()
        with pytest.raises(ValueError, match="was written without remembered losses"):
            train(tiny_vit(), digits(ROWS), tmp_path, resume=str(checkpoint), **arguments)


# ---- what is refused ----------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter(digits(16))


class Shuffled(TrimmingTrainer):
    """A data loader whose indices are those of another data set."""

    def get_train_dataloader(self):
        return DataLoader(Subset(self.train_dataset, range(16)[::-1]), 8, collate_fn=self.data_collator)


class Scaled(TrimmingTrainer):
    """A loss by hand, which has no losses of samples."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        logits = model(inputs["pixel_values"]).logits
        return (logits.logsumexp(-1) - logits.gather(1, inputs["labels"][:, None])[:, 0]).mean()


class Halves(TrimmingTrainer):
    """Splits each mini-batch."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        return sum(
            super(Halves, self).training_step(model, {name: x[part] for name, x in inputs.items()}, num_items_in_batch)
            for part in (slice(0, 4), slice(4, 8))
        )


class Chosen(TrimmingTrainer):
    """Two losses for each sample, and it is not known in which order."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        logits = model(inputs["pixel_values"]).logits
        return torch.nn.functional.cross_entropy(torch.cat([logits, -logits]), inputs["labels"].repeat(2))


def by_length(rows):
    rows = sorted(rows, key=lambda row: -int(row["attention_mask"].sum()))
    return default_data_collator(rows)


REFUSED = {
    "a stream": (Stream, {"max_steps": 2}, "need a training data set with a length and samples by index, and Stream"),
    "another data set": (lambda: digits(16), {"trainer_cls": Shuffled}, "which samples the data loader of Shuffled"),
    "a loss by hand": (lambda: digits(16), {"trainer_cls": Scaled}, "trim_memory=False"),
    "parts of mini-batches": (
        lambda: digits(16),
        {"trainer_cls": Halves},
        "over 4 rows where the data loader gave 8 samples",
    ),
    "an unknown order": (lambda: digits(16), {"trainer_cls": Chosen}, "has 16 losses for 8 samples"),
    "a collator that sorts": (lambda: digit_texts(16), {"collator": by_length}, "in the order of the collator"),
}


@pytest.mark.parametrize("select", ["hardest", "none"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_exactly_is_refused(case, select, tmp_path):
    rows, arguments, match = REFUSED[case]
    model = tiny_bert() if "sorts" in case else tiny_vit()
    start = weights(model)
    with pytest.raises(ValueError, match=match):
        remember(model, rows(), tmp_path, learning_rate=0.1, trim_select=select, **arguments)
    assert torch.equal(weights(model), start)


def test_texts_joined_to_one_are_refused(tmp_path):
    rows = [
        {name: row[name][: int(row["attention_mask"].sum())].tolist() for name in ("input_ids", "labels")}
        for row in HEADS["llama"][1]()[:16]
    ]
    with pytest.raises(ValueError, match="over 1 rows where the data loader gave 8 samples"):
        remember(make("llama"), rows, tmp_path, collator=DataCollatorWithFlattening())


class Tokens(TrimmingTrainer):
    """Takes the loss over the tokens with a label alone."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        has_label = inputs["labels"] != -100
        logits = model(inputs["input_ids"], inputs["attention_mask"]).logits
        return torch.nn.functional.cross_entropy(logits[has_label], inputs["labels"][has_label])


@pytest.mark.parametrize("count", [8, 16])
def test_as_many_tokens_as_samples_are_not_taken_for_these(count, tmp_path):
    rows = HEADS["masked-lm"][1]()[:8]
    for number, row in enumerate(rows):  # the first texts have two labels (or four), the last ones none
        row["labels"] = torch.full_like(row["labels"], -100)
        row["labels"][: count // 4] = 3 if number < 4 else -100
    with pytest.raises(ValueError, match=f"this mini-batch has {count} losses for 8 samples"):
        remember(make("masked-lm"), rows, tmp_path, trainer_cls=Tokens)


def test_a_data_loader_that_is_replaced_later(tmp_path):
    args = TrimmingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", trim_memory=True)
    trainer = TrimmingTrainer(tiny_vit(), args, train_dataset=digits(8))
    trainer.get_train_dataloader = lambda: DataLoader(digits(8), 8, collate_fn=default_data_collator)
    with pytest.raises(ValueError, match="which samples the data loader of TrimmingTrainer yields"):
        trainer.train()


def test_questions_that_have_no_answer(tmp_path):
    trainer = TrimmingTrainer(tiny_vit(), TrimmingArguments(str(tmp_path), use_cpu=True), train_dataset=digits(8))
    with pytest.raises(ValueError, match="set trim_memory=True before training"):
        trainer.hard_examples()
    trainer.args.trim_memory = True
    with pytest.raises(ValueError, match="train first"):
        trainer.hard_examples()
    memory = SampleMemory(3)
    with pytest.raises(ValueError, match="number of samples from 1 on, and is 0"):
        memory.hardest(0)
    with pytest.raises(ValueError, match="Did you mean 'mean_loss'"):
        memory.hardest(1, "mean_los")
    assert memory.hardest(1) == []
