"""Error against cost: differences to shorter plain training, and the verdict that follows from the numbers."""

import csv

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from hf_trim.files import write_json
from hf_trim.report import group, notes, summarize, table_rows
from hf_trim.report.__main__ import main
from hf_trim.report.cost_plot import plot_costs
from hf_trim.report.verdict import verdict, verdict_rows
from tests.support.helpers import record


SEEDS = 6
COSTS = {"plain": 1.0, "trimmed": 0.7, "adaptive": 0.8, "short": 0.8, "random-adaptive": 0.8}


def comparison(seeds=SEEDS, costs=COSTS, **changes):
    """Arms whose error differs from plain training's by about this much, and plain itself."""
    return [
        {
            # Seeds differ from each other by more than arms do; the paired differences by 0.1 at most.
            **record(arm, seed, 10.0 + seed + change + (0.1 if seed % 2 else -0.1) * (arm != "plain")),
            "forward_passes": 1000,
            "backward_passes": round(1000 * (3 * costs[arm] - 1) / 2),
        }
        for arm, change in {"plain": 0.0, **{name.replace("_", "-"): x for name, x in changes.items()}}.items()
        for seed in range(seeds)
    ]


def verdict_of(records):
    return verdict(summarize(records))


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        (
            {"adaptive": 0.0, "short": 1.0},
            "take adaptive: as plain within chance (+0.00, at worst +0.11), at 80 % of its cost",
        ),
        (
            {"adaptive": 0.0, "short": 0.0},
            "take short: as plain within chance (+0.00, at worst +0.11), at 80 % of its cost",
        ),
        ({"adaptive": 0.5, "short": 1.0}, "take plain: no arm is better, and none is cheaper without harm"),
        ({"adaptive": -0.5, "trimmed": -1.0}, "take trimmed: better than plain, by −1.00, at 70 % of its cost"),
        ({"trimmed": 0.0, "adaptive": 0.0, "short": 0.0}, "take trimmed: as plain within chance"),  # clearly cheaper
        ({"adaptive": 0.5, "random_adaptive": 0.0, "short": 1.0}, "take random-adaptive: as plain"),
    ],
)
def test_verdicts_are_what_the_numbers_say(errors, said):
    records = comparison(**errors)
    assert verdict_of(records).startswith(said)
    assert f"Verdict: {verdict_of(records)}." in notes(records)


def test_without_enough_seeds_or_savings_there_is_no_such_verdict():
    assert verdict_of(comparison(seeds=4, adaptive=0.0)) == "fewer than 5 seeds: no verdict"
    assert not [note for note in notes(comparison(seeds=4, adaptive=0.0)) if "Verdict" in note]
    alone = [{**run, "arm": "trimmed"} for run in comparison()]
    assert verdict_of(alone) == "no plain training to compare with: no verdict"
    assert notes(alone) == ["There is no plain training among the runs to compare with: add the arm plain."]
    same_cost = dict.fromkeys(COSTS, 1.0)
    assert verdict_of(comparison(costs=same_cost, adaptive=0.0)).startswith("take plain")
    useless = [{**run, "majority_error": 5.0} for run in comparison(adaptive=0.0)]
    assert verdict_of(useless) == "no arm is better than always the most frequent class: no verdict"
    older = [{key: value for key, value in run.items() if "passes" not in key} for run in comparison(adaptive=0.0)]
    assert (
        verdict_of(older).endswith("the records do not say what each of them cost")
        and summarize(older)[1].cost is None
    )
    assert verdict_of([{**run, "arm": "plain"} for run in older[:SEEDS]]) == "fewer than 5 seeds: no verdict"


def test_an_arm_with_fewer_seeds_is_not_judged():
    """On five of the eight seeds `short` happens to be as good as plain, and would win."""
    records = [run for run in comparison(seeds=8, adaptive=1.0, short=0.0) if run["arm"] != "short" or run["seed"] < 5]
    assert verdict_of(records).endswith("none is cheaper without harm; not judged, with fewer seeds: short")
    assert notes(records)[0].startswith("Warning: not all arms have the same seeds (short lacks 5, 6, 7)")
    assert verdict_of([run for run in records if run["seed"] < 5]).startswith("take short")


def test_a_training_that_ends_in_nan_is_worse_and_told(tmp_path, capsys):
    for bad in (float("nan"), float("inf")):
        records = comparison(adaptive=0.0, short=0.0)
        records = [
            {**run, "test_error": bad} if run["arm"] == "short" and run["seed"] == 3 else run for run in records
        ]
        assert verdict_of(records).startswith("take adaptive: as plain")
        assert verdict_of(records).endswith("; not judged, since a training ended in NaN or infinity: short")
        assert notes(records)[0] == "Warning: with a training that ended in NaN or infinity: short."
        write_json(tmp_path / "records.json", records)
        write_json(tmp_path / "copy.json", records)
        assert main([str(tmp_path), "--output", str(tmp_path / "report" / "of")]) == 0
        records[0]["test_error"] = bad
        assert verdict_of(records) == "plain training ended in NaN or infinity: no verdict"
    capsys.readouterr()


def test_numbers_of_the_table(tmp_path):
    records = comparison(adaptive=0.2, short=1.0)
    head, rows = table_rows(records)
    cells = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["arm"] for row in cells] == ["plain", "adaptive", "short"]
    assert [row["cost"] for row in cells] == ["100 %", "80 %", "80 %"]
    assert [row["to short"] for row in cells] == ["−1.00 (−1.11 … −0.89)", "−0.80 (−0.80 … −0.80)", "–"]
    assert [row["better than short"] for row in cells] == ["6 of 6", "6 of 6", "–"]
    (head, (row,)) = verdict_rows(group(records))
    assert dict(zip(head, row, strict=True)) == {
        "runs of": "tiny", "seeds": "6", "plain, test error %": "12.50",
        "trimmed; cost, speed-up; difference to plain": "–",
        "adaptive; cost, speed-up; difference to plain": "12.70; 80 %, 1.00×; +0.20 (+0.09 … +0.31)",
        "short; cost, speed-up; difference to plain": "13.50; 80 %, 1.00×; +1.00 (+0.89 … +1.11)",
        "adaptive to short": "−0.80 (−0.80 … −0.80)", "verdict": verdict_of(records),
    }  # fmt: skip
    # Only some runs were timed.
    timed = [{**run, "train_seconds": 10.0 if run["seed"] < 2 else None} for run in records]
    assert [row[-2] for row in table_rows(timed)[1]] == ["10.0 s (2 of 6 runs)"] * 3
    better = [{**run, "test_error": run["test_error"] - (run["arm"] == "adaptive")} for run in timed]
    assert verdict_of(better).endswith("1.00× as fast (2 of 6 seeds timed)")
    write_json(tmp_path / "records.json", records)
    assert main([str(tmp_path / "records.json"), "--output", str(tmp_path / "report")]) == 0
    (_, adaptive, _) = csv.DictReader((tmp_path / "report" / "report.csv").read_text().splitlines())
    assert (adaptive["cost"], adaptive["to_short_wins"], adaptive["to_plain_pairs"]) == ("0.8", "6", "6")
    report = (tmp_path / "report" / "report.md").read_text()
    assert report.startswith("## At what cost\n\n![Error against cost](costs.png)\n\n| runs of |")
    assert (tmp_path / "report" / "costs.png").stat().st_size > 10_000


def test_the_plot_has_a_point_for_each_arm_with_a_cost(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("hf_trim.report.cost_plot.save_figure", lambda figure, path: drawn.append(figure))
    older = {"older": [record("plain", seed, 5.0) for seed in range(2)]}
    assert not plot_costs(older, tmp_path / "a.png") and not drawn
    title = "recipe {}, label_noise 0.2, max_train_samples 2000, num_train_epochs 10"
    groups = {title.format(n): comparison(adaptive=float(n), short=1.0) for n in range(5)}
    assert plot_costs({**groups, **older}, tmp_path / "a.png")
    (figure,) = drawn
    assert len(figure.axes) == 5
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:  # a long title is not cut off, and does not run into the next one
        assert axes.title.get_window_extent().width < figure.bbox.width / 4
    points = [(float(x), float(y)) for line in figure.axes[2].lines for x, y in [line.get_xydata()[0]]]
    assert {(round(x), round(y, 1)) for x, y in points} >= {(100, 12.5), (80, 14.5), (80, 13.5)}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plain", "adaptive", "short"]
