"""Trimming over the data set: which samples an epoch has by each rule, beside loops written out, and what it costs."""

import json
import math

import numpy as np
import pytest
import torch

from hf_trim.data import DeviceImages
from hf_trim.run.recipe import parse
from hf_trim.run.trainer import load_job_data, make_trainer
from tests.support import dataset_scope


N, EPOCHS = 40, 10


def hardest_first(losses, places):
    return sorted(places, key=lambda place: (-losses[place], place))


def rank_by_hand(p, epoch, losses, seen):
    k, kept = round(p * len(losses)), []
    back = [place for place in range(len(losses)) if epoch - seen[place] >= 4]
    for place in sorted(back, key=lambda place: (seen[place], -losses[place])):
        if len(kept) < k // 2:
            kept.append(place)
    for place in hardest_first(losses, range(len(losses))):
        if len(kept) < k and place not in kept:
            kept.append(place)
    return kept


def mass_by_hand(epoch, losses, seen):
    kept, left_out = set(range(len(losses))), 0.0
    budget = 0.05 * sum(1 - math.exp(-loss) for loss in losses)
    for place in reversed(hardest_first(losses, range(len(losses)))):
        left_out += 1 - math.exp(-losses[place])
        if left_out > budget:
            break
        if epoch - seen[place] < 4:
            kept.remove(place)
    return kept


@pytest.mark.parametrize("epoch", range(1, EPOCHS))
def test_each_rule_has_the_samples_of_a_loop_written_out(epoch):
    rng = np.random.default_rng(epoch)
    losses, seen = rng.exponential(size=N) ** 3, rng.integers(max(0, epoch - 6), epoch, size=N)

    def scope(arm, weight=1.0):
        weights = dataset_scope.weights_of(arm, epoch, EPOCHS, losses, seen, np.random.default_rng(0))
        return {place for place in range(N) if weights[place] == weight}

    falling = 1 - 0.8 * epoch / (EPOCHS - 1)
    assert scope("rank") == set(rank_by_hand(falling, epoch, losses, seen))
    last = dataset_scope.fractions("rank-last", EPOCHS)[epoch]
    assert scope("rank-last") == set(rank_by_hand(last, epoch, losses, seen))
    assert scope("mass") == mass_by_hand(epoch, losses, seen)
    assert len(scope("random")) == len(scope("rank")) and scope("random") != scope("rank")
    assert len(scope("random-last")) == len(scope("rank-last")) and (
        last == 1 or scope("random-last") != scope("rank-last")
    )
    assert scope("plain") == scope("short") == set(range(N))
    easy = {place for place in range(N) if losses[place] < sum(losses) / N}
    if epoch < 9:  # 87.5 % of ten epochs
        assert scope("infobatch") == set(range(N)) - easy
        assert scope("infobatch", 2) | scope("infobatch", 0) == easy
        assert 0.2 * len(easy) < len(scope("infobatch", 2)) < 0.8 * len(easy)
    else:
        assert scope("infobatch") == set(range(N))


def test_samples_come_back_beside_the_hardest():
    losses, seen = np.arange(N, 0, -1.0), np.full(N, 8)
    seen[-10:] = 5  # the easiest ten, not seen in the epochs 6, 7 and 8
    weights = dataset_scope.weights_of("rank", 9, EPOCHS, losses, seen, np.random.default_rng(0))
    assert weights.nonzero()[0].tolist() == [0, 1, 2, 3, 30, 31, 32, 33]  # p = 0.2: half of 8
    seen[-10:] = 6
    weights = dataset_scope.weights_of("rank", 9, EPOCHS, losses, seen, np.random.default_rng(0))
    assert weights.nonzero()[0].tolist() == list(range(8))


@pytest.mark.parametrize("epochs", [5, 10, 12, 15, 30])
def test_fractions_have_the_same_cost(epochs):
    rank, last = (dataset_scope.fractions(arm, epochs) for arm in ("rank", "rank-last"))
    assert (rank[0], rank[-1]) == (1, pytest.approx(0.2)) and sorted(rank, reverse=True) == rank
    assert sum(rank) == pytest.approx(0.6 * epochs) == pytest.approx(sum(last))
    whole = round(epochs / 5)
    assert last[0] == 1 and last[-whole:] == [1] * whole and min(last) == pytest.approx(0.1, abs=0.03)
    assert sorted(last[:-whole], reverse=True) == last[:-whole]


def test_three_epochs_are_too_few_for_a_whole_one_at_the_end():
    assert dataset_scope.fractions("rank-last", 3) == dataset_scope.fractions("random-last", 3) == []


def test_only_the_last_mini_batch_of_a_whole_epoch_may_not_be_full():
    order = np.arange(10)
    assert dataset_scope.split(order, 4, True) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert dataset_scope.split(order, 4, False) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert dataset_scope.split(order[:8], 4, False) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert dataset_scope.split(order[:3], 4, False) == [[0, 1, 2]]


def prepare(recipe, folder, *options):
    job = parse(recipe, [*options])
    data = load_job_data(job)
    return job, data, make_trainer(job, data, {"trim_select": "none", "save_strategy": "no"}, 3, folder, title="toy")


def test_plain_is_the_recipe_bit_for_bit(recipe, tmp_path):
    own, theirs = prepare(recipe, tmp_path)[2], prepare(recipe, tmp_path)[2]
    sizes = dataset_scope.train(own, "plain", seed=3)
    before = next(theirs.model.parameters()).clone()
    theirs.train()
    pairs = list(zip(own.model.parameters(), theirs.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs) and not torch.equal(before, pairs[0][1])
    assert sizes == [16] * 12 and theirs.state.global_step == 12


def test_the_hardest_are_loaded_and_the_rest_is_not(recipe, tmp_path, monkeypatch):
    _, data, trainer = prepare(recipe, tmp_path, "--learning_rate", "1e-30")
    whole = data.train_dataset
    with torch.no_grad():  # at so low a learning rate the losses stay as they are
        batch = whole.__getitems__(list(range(64)))[0]
        logits = trainer.model(pixel_values=batch["pixel_values"]).logits
    each = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none").tolist()
    order, loaded, fetch = hardest_first(each, range(64)), [], DeviceImages.__getitems__

    def note(dataset, indices):
        loaded.append(indices)
        return fetch(dataset, indices)

    monkeypatch.setattr(DeviceImages, "__getitems__", note)
    assert dataset_scope.train(trainer, "rank", seed=3) == [16] * 6 + [13]
    assert sorted(sum(loaded[:4], [])) == list(range(64))
    second = set(sum(loaded[4:6], []))  # p = 0.6: 38 samples, of which the last six fill no mini-batch
    assert len(second) == 32 and second < set(order[:38])
    assert sorted(loaded[6]) == sorted(order[:13])  # p = 0.2


def test_a_short_training_ends_where_its_learning_rate_does(recipe, tmp_path, monkeypatch):
    trainer, rates = prepare(recipe, tmp_path, "--lr_scheduler_type", "linear")[2], []
    create = trainer.create_optimizer

    def create_optimizer():
        optimizer = create()
        optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(trainer, "create_optimizer", create_optimizer)
    assert dataset_scope.train(trainer, "short", seed=3, steps=5) == [16] * 5
    assert rates == pytest.approx([0.01 * left / 5 for left in (5, 4, 3, 2, 1)])


def test_the_script_counts_costs_and_goes_on(recipe, tmp_path, capsys, monkeypatch):
    path = tmp_path / "rows.json"
    command = [recipe, "--output", str(path), "--num_train_epochs", "2"]
    dataset_scope.main([*command, "--seeds", "1"])
    rows = {row["arm"]: row for row in json.loads(path.read_text())}
    assert list(rows) == list(dataset_scope.ARMS)
    for row in rows.values():
        assert row["steps"] == len(row["sizes"]) and row["cost"] == sum(row["sizes"]) / 128 and row["error"] > 0
    assert rows["plain"]["cost"] == 1 and rows["rank"]["sizes"] == rows["random"]["sizes"] == [16] * 4 + [13]
    assert rows["short"]["sizes"] == [16] * 5
    for rule in ("infobatch", "mass"):
        assert rows[f"short-{rule}"]["steps"] == rows[rule]["steps"] <= 8
    with pytest.raises(SystemExit):
        dataset_scope.main([*command, "--seeds", "2", "--arms", "plain", "short"])
    assert "--arms short takes the steps of rank: add that." in capsys.readouterr().err
    dataset_scope.main([*command, "--seeds", "2", "--arms", "plain"])
    rows = json.loads(path.read_text())
    assert [(row["arm"], row["seed"]) for row in rows[len(dataset_scope.ARMS) :]] == [("plain", 1)]
    capsys.readouterr()
    monkeypatch.setattr(dataset_scope, "run", lambda *_: pytest.fail("It was trained again."))
    dataset_scope.main([*command, "--seeds", "1"])
    assert f"| {rows[1]['error']:.2f} | 0.60 |" in capsys.readouterr().out
    assert len(json.loads(path.read_text())) == len(rows)


def test_the_verdict_is_by_pairs_of_the_same_cost():
    def row(task, arm, seed, error):
        return {"task": task, "options": "", "arm": arm, "seed": seed, "error": error, "cost": 0.6}

    rows = []
    for seed, noise in enumerate((0.0, 5.0, 1.0, 0.0, 0.0)):
        for task, by in (("a", -1.0), ("b", -1.0 + noise)):
            rows += [row(task, "short", seed, 9 + noise), row(task, "rank", seed, 9 + noise + by)]
    printed = dataset_scope.report(rows)
    assert "| a | rank | 9.20 ± 2.17 | 0.60 | -1.00 (-1.00 … -1.00) | 5 : 0 |" in printed
    assert "| b | rank | 10.40 ± 4.34 | 0.60 | +0.20 (-2.49 … +2.89) | 3 : 1 |" in printed
    assert printed.endswith("rank: lower error than short on 1 of 2 tasks, beyond chance on 1 of the 2 with 5 seeds.")
    few = dataset_scope.report([row for row in rows if row["seed"] < 3])
    assert "| b | rank | 12.00 ± 5.29 | 0.60 | +1.00 [-1.00 … +4.00] | 1 : 1 |" in few
    assert few.endswith("rank: lower error than short on 1 of 2 tasks, beyond chance on 0 of the 0 with 5 seeds.")
    one = dataset_scope.report([row for row in rows if row["seed"] == 1])
    assert "| b | rank | 18.00 | 0.60 | +4.00 | 0 : 1 |" in one
