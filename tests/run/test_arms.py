"""What each arm of a comparison trains, what that costs, and shorter plain training at the same cost."""

import json

import pytest
import yaml
from filelock import FileLock

from hf_trim.run.__main__ import main
from hf_trim.run.arms import make_arm, needed_arms
from hf_trim.run.cost import count_passes
from hf_trim.run.grid import expand
from hf_trim.run.recipe import parse
from hf_trim.run.records import cost_of, read_record
from hf_trim.run.trainer import load_job_data, make_trainer
from tests.support.recipes import TIMM


ROWS, EPOCHS = 64, 9


def passes(record):
    return record["forward_passes"], record["backward_passes"]


def records_of(folder):
    return {path.name.partition("-seed")[0]: read_record(path) for path in folder.glob("records/*.json")}


def test_shorter_plain_training_costs_what_adaptive_does(recipe, tmp_path, capsys, no_plots):
    out = tmp_path / "out"
    options = [
        recipe,
        "--compare",
        "--seeds",
        "1",
        "--label_noise",
        "0.1",
        "--num_train_epochs",
        "9",
        "--learning_rate",
        "0.02",
        "--seed",
        "1",
        "--output_dir",
    ]
    arms = ["--arms", "plain", "trimmed", "adaptive", "adaptive-skip", "short"]
    assert main([*options, str(out), *arms]) == 0
    found = records_of(out)
    assert passes(found["plain"]) == (ROWS * EPOCHS, ROWS * EPOCHS)
    # p is 1, 0.9, ..., 0.2 of mini-batches of 16.
    assert passes(found["trimmed"]) == (ROWS * EPOCHS, 4 * sum(round(16 * p / 10) for p in range(10, 1, -1)))
    forward, backward = passes(found["adaptive"])
    kept = [log["kept_fraction"] for log in found["adaptive"]["history"] if "kept_fraction" in log]
    assert forward == ROWS * EPOCHS and backward == round(sum(ROWS * fraction for fraction in kept)) < forward
    # Cut to whole mini-batches, downwards: it never costs more.
    steps = cost_of(found["adaptive"]) // (3 * 16)
    assert passes(found["short"])[0] == 16 * steps and found["short"]["history"][-1]["epoch"] == steps / 4
    # Without as many of the hardest as labels are wrong.
    fractions = [log["kept_fraction"] for log in found["adaptive-skip"]["history"] if "kept_fraction" in log]
    assert max(fractions) <= 0.9 < max(kept)
    # The record of the arm that it depends on is what counts, also in a later call.
    (out / "records" / "short-seed1.json").unlink()
    assert main([*options, str(out), *arms]) == 0
    assert records_of(out)["short"]["test_loss"] == found["short"]["test_loss"]
    capsys.readouterr()
    # An earlier version's has no cost.
    path = out / "records" / "adaptive-seed1.json"
    content = {key: value for key, value in json.loads(path.read_text()).items() if "passes" not in key}
    path.write_text(json.dumps(content))
    (out / "records" / "short-seed1.json").unlink()
    assert main([*options, str(out), *arms]) == 2
    assert "adaptive, seed 1, was written by an earlier version" in capsys.readouterr().err


def test_short_is_trained_where_another_process_finished_what_it_needs(recipe, tmp_path, no_plots):
    options = [recipe, "--compare", "--seeds", "1", "--seed", "1", "--output_dir", str(tmp_path / "out"), "--arms"]
    assert main([*options, "plain", "trimmed"]) == 0
    # The other process held the lock when this one came to the run.
    with FileLock(tmp_path / "out" / "records" / "plain-seed1.json.lock"):
        assert main([*options, "plain", "trimmed", "short"]) == 0
    assert "short" in records_of(tmp_path / "out")


def test_the_whole_schedule_gets_shorter(recipe):
    job = parse(recipe, ["--warmup_steps", "4", "--lr_milestones", "1", "2", "--compare", "--seeds", "1"])
    data = load_job_data(job)
    half = {"arm": "adaptive", "forward_passes": 3 * ROWS, "backward_passes": 3 * ROWS // 4}
    arm = make_arm(job, "short", 1, data, half)
    assert arm.changes["num_train_epochs"] == pytest.approx(1.5) and arm.changes["warmup_steps"] == 2
    trainer = make_trainer(arm.job, data, arm.changes, 1, "unused")
    trainer.create_optimizer_and_scheduler(6)
    assert sorted(trainer.lr_scheduler.milestones) == [2, 4] and job.run.lr_milestones == [1, 2]
    stable = '{"num_stable_steps": 4, "num_decay_steps": 8, "min_lr_ratio": 0.1}'
    options = ["--lr_scheduler_type", "warmup_stable_decay", "--lr_scheduler_kwargs", stable]
    arm = make_arm(parse(recipe, options), "short", 1, data, half)
    assert arm.changes["lr_scheduler_kwargs"] == {"num_stable_steps": 2, "num_decay_steps": 4, "min_lr_ratio": 0.1}
    assert needed_arms(job, "short") == ("plain", "adaptive") and needed_arms(job, "random") == ()


@pytest.mark.parametrize(
    ("options", "saved", "steps"),
    [
        ([], 1, 11),  # of 12, where 11.99 could be afforded
        ([], 0, None),
        ([], -1, None),
        ([], 3 * 3 * ROWS - 1, 1),
        (["--num_train_epochs", "0.2"], 1, None),  # one step
        (["--gradient_accumulation_steps", "3"], 1, 5),  # of 6: each second one has one mini-batch
        (["--gradient_accumulation_steps", "3"], 3 * 17, 4),
        (["--max_train_samples", "100", "--dataloader_drop_last"], 3 * 3 * (ROWS - 100) + 3 * 17, 17),  # of 18
    ],
)
def test_short_never_costs_more(options, saved, steps, recipe):
    job = parse(recipe, [*options, "--compare", "--seeds", "1"])
    data = load_job_data(job)
    drawn = round(job.training.num_train_epochs * ROWS)
    arm = make_arm(job, "short", 1, data, {"forward_passes": 3 * drawn - saved, "backward_passes": 0})
    assert arm.same_as == ("plain" if steps is None else None)
    if steps is not None:
        trainer = make_trainer(arm.job, data, arm.changes, 1, "unused")
        assert trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1] == steps


def test_where_nothing_is_saved_short_is_plain(tmp_path, capsys, no_plots):
    path = tmp_path / "timm.yaml"
    path.write_text(yaml.safe_dump(TIMM))
    options = [str(path), "--compare", "--seeds", "1", "--arms", "plain", "trimmed", "short", "--output_dir"]
    assert main([*options, str(tmp_path / "out")]) == 0
    found = records_of(tmp_path / "out")
    assert passes(found["trimmed"]) == (ROWS, ROWS)  # batch normalization mixes the samples
    assert found["short"] == {**found["plain"], "arm": "short", "cost_of": "trimmed"}
    assert "% (the same as plain: trimmed saves no whole step)\n" in capsys.readouterr().out
    # With another arm it would have another cost.
    assert main([*options[:-1], "adaptive", "--output_dir", str(tmp_path / "out")]) == 2
    assert "was trained at the cost of trimmed, and would now have that of adaptive" in capsys.readouterr().err
    (tmp_path / "out" / "records" / "short-seed42.json").write_text("{")
    assert main([*options, str(tmp_path / "out")]) == 2
    assert "short-seed42.json is no record of a finished run" in capsys.readouterr().err


def test_a_part_of_the_data_set_costs_no_forward_pass_of_the_rest(recipe, tmp_path, capsys, no_plots):
    options = [recipe, "--trim_scope", "dataset", "--trim_refresh", "2", "--label_noise", "0.1"]
    options += ["--output_dir", str(tmp_path / "out")]
    assert main([*options, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert (
        "Schedule: the hardest samples of the data set; p in each epoch: 1, 0.2, 1." in said
        and "Steps: 9 of 16 samples (3 epochs)" in said
        and "without trimming" not in said
    )
    arms = ["plain", "trimmed", "adaptive", "adaptive-skip", "random", "short"]
    assert main([*options, "--compare", "--seeds", "1", "--arms", *arms]) == 0
    found = records_of(tmp_path / "out")
    # Mini-batches of 16: all four, then one, and all again.
    for arm in ("trimmed", "random"):
        assert passes(found[arm]) == (64 + 16 + 64,) * 2
        assert [log["keep_fraction"] for log in found[arm]["history"]] == [1, 0.2, 1]
    assert passes(found["adaptive"])[0] == 3 * ROWS  # which trims mini-batches
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "of the training data, by their last losses, in each epoch only the fraction p with the highest loss" in card
    )


def test_passes_of_other_ways_to_train(recipe, tmp_path):
    def count(*options, is_language=False):
        job = parse(
            recipe, ["--num_train_epochs", "1", "--trim_keep_start", "0.5", "--trim_keep_end", "0.5", *options]
        )
        trainer = make_trainer(job, load_job_data(job), {"save_strategy": "no"}, 1, tmp_path / "unused")
        trainer.train()
        return tuple(count_passes(trainer, is_language).values())

    assert count() == (ROWS, ROWS // 2)
    assert count("--trim_backward", "replay") == (ROWS + ROWS // 2, ROWS // 2)
    assert count("--trim_backward", "dense") == (ROWS, ROWS)
    assert count(is_language=True) == (ROWS, ROWS)  # single tokens were kept


def test_entries_of_a_grid(recipe, tmp_path, capsys):
    path = tmp_path / "grid.yaml"

    def parts(*recipes, **fields):
        path.write_text(yaml.safe_dump({"recipes": recipes, "seeds": 2, **fields}))
        return {options[-1].split("/")[-1]: parse(name, options) for name, options in expand(str(path), [])[1]}

    noisy = {"recipe": recipe, "label_noise": 0.2, "seeds": 4, "arms": ["plain", "adaptive-skip"]}
    jobs = parts(recipe, noisy, {"recipe": recipe, "vary": {"trim_keep_end": [0.5, 0.6]}})
    assert list(jobs) == ["tiny", "tiny_label_noise-0.2", "tiny_trim_keep_end-0.5", "tiny_trim_keep_end-0.6"]
    assert [job.run.seeds for job in jobs.values()] == [2, 4, 2, 2]
    assert jobs["tiny_label_noise-0.2"].run.arms == ["plain", "adaptive-skip"]
    for recipes, message in (
        ([recipe, {"recipe": recipe, "seeds": 4}], "has two comparisons tiny"),
        ([{"label_noise": 0.2}], "each a name or a mapping with 'recipe'"),
        ([{"recipe": recipe, "vary": {"seed": 1}}], "'vary' must give each field a list of values"),
        ([{"recipe": recipe, "output_dir": "mine"}], "tiny.yaml has an output_dir, mine: leave it out"),
    ):
        with pytest.raises(ValueError, match=message):
            parts(*recipes)


def test_a_grid_says_which_comparison_is_wrong_and_has_a_folder(recipe, tmp_path, capsys):
    path = tmp_path / "grid.yaml"
    entries = [recipe, {"recipe": recipe, "label_noise": 0.2, "trim_keep_end": 3}]
    path.write_text(yaml.safe_dump({"recipes": entries, "output_dir": "mine"}))
    assert main([str(path)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "in the comparison tiny_label_noise-0.2_trim_keep_end-3: trim_keep_end must be" in message
    folder, comparisons = expand(str(path), [])
    assert folder == "mine" and comparisons[0][1][-1] == "mine/tiny"
    assert expand(str(path), ["--output_dir", "other"])[0] == "other"


def test_the_small_table_has_the_protocol_of_the_paper():
    jobs = [parse(name, options) for name, options in expand("table1-small", [])[1]]
    assert len(jobs) == 4
    for job in jobs:
        epochs = job.training.num_train_epochs
        assert job.run.lr_milestones == [epochs / 3, 2 * epochs / 3] and job.run.lr_gamma == 0.5
        assert (job.run.l2_weight_decay, job.training.learning_rate, job.run.seeds) == (1e-4, 1e-3, 10)
        assert (job.training.trim_keep_start, job.training.trim_keep_end) == (1, 0.2)
        assert job.training.trim_schedule == "epoch" and not job.training.is_adaptive


def test_the_battery_has_the_controls():
    jobs = [parse(name, options) for name, options in expand("battery", [])[1]]
    assert len(jobs) == 12
    for job in jobs:
        noisy = ["adaptive-skip"] * bool(job.data.label_noise)
        assert job.run.arms == ["plain", "trimmed", "adaptive", "random-adaptive", *noisy, "short"]
        assert job.run.seeds == (3 if job.data.task == "causal-lm" else 10)
