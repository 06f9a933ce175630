"""Tables and plots from records alone."""

import csv
import json
import math
import re
import shutil

import pytest
from matplotlib.figure import Figure
from matplotlib.testing.compare import compare_images
from scipy.stats import ttest_1samp

from hf_trim.files import write_json
from hf_trim.report import (
    ARMS,
    find_records,
    group,
    notes,
    plot,
    print_report,
    summarize,
    table_rows,
)
from hf_trim.report.__main__ import main
from hf_trim.report.summary import paired_interval
from hf_trim.report.tables import overview_rows
from tests.support.helpers import record
from tests.support.readme_tables import PICTURE, READMES, RESULTS, TABLE, draw, make_again


PLAIN, TRIMMED = [5.0, 6.0, 7.5], [4.0, 6.5, 6.0]


def three_seeds(**arguments):
    records = [record("plain", seed, error, **arguments) for seed, error in enumerate(PLAIN)]
    return records + [record("trimmed", seed, error, 8.0, **arguments) for seed, error in enumerate(TRIMMED)]


def test_summary():
    trimmed = summarize(three_seeds())[1]
    assert (trimmed.arm, trimmed.runs, trimmed.speedup, trimmed.to_plain.wins) == (
        "trimmed",
        3,
        pytest.approx(1.25),
        2,
    )
    assert trimmed.mean == pytest.approx(5.5) and trimmed.sd == pytest.approx(math.sqrt(1.75))
    assert trimmed.to_plain.mean == pytest.approx(sum(TRIMMED) / 3 - sum(PLAIN) / 3)
    assert trimmed.to_plain.span == (-1.5, 0.5) and trimmed.to_plain.interval is None  # too few for an interval
    row = table_rows(three_seeds())[1][1]
    assert row[3:] == ["−0.67 [−1.50 … +0.50]", "2 of 3", "100 %", "8.0 s", "1.25× [1.25 … 1.25]"]
    six = [{**run, "seed": run["seed"] + shift} for shift in (0, 3) for run in three_seeds()]
    low, high = summarize(six)[1].to_plain.interval
    expected = ttest_1samp([-1.0, 0.5, -1.5] * 2, 0).confidence_interval()
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert paired_interval([1.0]) is None and paired_interval([2.0, 2.0]) == (2.0, 2.0)
    assert table_rows(three_seeds()[:1])[1] == [["plain", "1", "5.00", "–", "–", "100 %", "10.0 s", "–"]]


def test_a_clock_that_was_disturbed_gives_no_times():
    records = [{**run, "train_seconds": None} for run in three_seeds()]
    assert [row[-2:] for row in table_rows(records)[1]] == [["–", "–"], ["–", "–"]]
    assert [row[2:5] for row in table_rows(records)[1]] == [row[2:5] for row in table_rows(three_seeds())[1]]


def test_the_papers_numbers_stand_beside_ours():
    records = three_seeds(recipe="cifar10-densenet121")
    rows = table_rows(records)[1]
    assert rows[1] == ["plain (paper)", "10", "10.10", "–", "–", "–", "–", "–"]
    assert rows[3] == ["trimmed (paper)", "10", "10.19", "+0.09", "–", "–", "–", "–"]
    head, (ours, paper) = overview_rows(group(records))
    assert ours == ["cifar10-densenet121", "3", rows[0][2], "; ".join([rows[2][2], rows[2][5], rows[2][3]]), "–"]
    assert paper == ["cifar10-densenet121 (paper)", "10", "10.10", "10.19; 60 %; +0.09", "–"]


def test_report_of_many_runs(tmp_path, capsys):
    for name, settings in (("a", {"trim_keep_end": 0.2}), ("b", {"trim_keep_end": 0.5})):
        for run in three_seeds(num_train_epochs=2, **settings):
            write_json(tmp_path / "runs" / name / "records" / f"{run['arm']}-seed{run['seed']}.json", run)
    write_json(tmp_path / "other.json", three_seeds(recipe="other"))
    arguments = [str(tmp_path / "runs"), str(tmp_path / "other.json"), "--output"]
    assert main([*arguments, str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    assert all(
        title in printed for title in ("All", "other", "tiny, trim_keep_end 0.2", "tiny, trim_keep_end 0.5", "−0.67 [")
    )
    report = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert set(report) == {"report.md", "report.csv", "records.json", "other.png", "tiny__trim_keep_end_0.2.png",
                           "tiny__trim_keep_end_0.5.png"}  # fmt: skip
    rows = list(csv.DictReader(report["report.csv"].decode().splitlines()))
    assert [(row["runs of"], row["arm"]) for row in rows][:2] == [("other", "plain"), ("other", "trimmed")]
    assert float(rows[1]["mean"]) == 5.5
    assert report["report.md"].decode().startswith("## All\n\n| runs of | seeds | plain, test error % |")
    assert report["report.md"].decode().count("\n| tiny, trim_keep_end 0.5 | 3 | 6.17 ± 1.26 | 5.50 ± 1.32; ") == 1
    # Made again of what it wrote, it is the same, byte for byte.
    assert main([str(tmp_path / "report" / "records.json"), "--output", str(tmp_path / "again")]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == report


def test_records_are_found_once_and_broken_ones_named(tmp_path, capsys):
    write_json(tmp_path / "a.json", three_seeds())
    write_json(tmp_path / "b.json", three_seeds()[:2])
    assert len(find_records([str(tmp_path)])) == 6
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "there is no file or folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2
    assert "no records in" in capsys.readouterr().err
    (tmp_path / "b.json").write_text(json.dumps([{"arm": "plain"}]))
    assert main([str(tmp_path)]) == 2
    assert "b.json is no record of a finished run: it has no 'seed'." in capsys.readouterr().err
    for content, wrong in (("[", "but broken, or no JSON: Expecting value"), ("[1]", "it holds something else")):
        (tmp_path / "b.json").write_text(content)
        assert main([str(tmp_path)]) == 2
        assert wrong in " ".join(capsys.readouterr().err.split())
    write_json(tmp_path / "b.json", [record("trimmed", 1, 9.0)])
    assert main([str(tmp_path)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "a.json and " in error and "b.json have different records of tiny, trimmed, seed 1: give one" in error
    assert main([str(tmp_path / "a.json"), "--output", str(tmp_path / "b.json" / "report")]) == 2
    assert "cannot write the report to" in capsys.readouterr().err
    write_json(tmp_path / "b.json", [record("trimmmed", 1, 5.0)])
    assert main([str(tmp_path)]) == 2
    assert "b.json has a run of an arm 'trimmmed': there are plain, trimmed," in capsys.readouterr().err


def test_readmes_have_the_tables_of_the_committed_records():
    texts = [readme.read_text(encoding="utf-8") for readme in READMES]
    assert [make_again(text) for text in texts] == texts
    shown = {name for text in texts for found in TABLE.finditer(text) for name in found[2].split()}
    assert shown == {path.name for path in RESULTS.glob("*.json")}


def test_the_picture_of_the_readme_is_that_of_the_committed_records(tmp_path):
    draw(tmp_path / "battery.png")
    shutil.copy(PICTURE, tmp_path / "committed.png")  # what differs is written beside it
    assert compare_images(tmp_path / "committed.png", tmp_path / "battery.png", tol=1) is None
    assert "](recipes/results/battery.png)" in READMES[0].read_text(encoding="utf-8")


def test_few_seeds_have_no_interval_and_a_note():
    def told(seeds):
        records = [record(arm, seed, 5.0 + seed) for arm in ("plain", "trimmed") for seed in range(seeds)]
        return table_rows(records)[0][3], notes(records)

    head, (note,) = told(1)
    assert head == "difference to plain" and note.startswith("One seed cannot tell a difference from chance")
    head, (note,) = told(3)
    assert head == "difference to plain [range]" and "all 3 would agree in sign in 1 of 4 comparisons" in note
    assert told(5) == (
        "difference to plain (95 % interval)",
        ["Verdict: take plain: no arm is better, and the records do not say what each of them cost."],
    )


def test_the_most_frequent_class_stands_beside_the_table(tmp_path, capsys):
    records = [{**run, "majority_error": 6.2, "test_macro_f1": 0.75} for run in three_seeds()]
    head, rows = table_rows(records)
    assert head[3] == "macro-F1" and rows[0][3] == "0.75"
    assert notes(records)[1:] == ["Always the most frequent class has a test error of 6.20 %."]
    write_json(tmp_path / "records.json", [{**run, "majority_error": 6.0} for run in records])
    assert main([str(tmp_path / "records.json"), "--output", str(tmp_path / "report")]) == 0
    warning = "Warning: not better than that: plain."
    assert warning in capsys.readouterr().out and warning in (tmp_path / "report" / "report.md").read_text()


def test_a_single_training_is_no_comparison_and_nothing_is_to_be_deleted(tmp_path, capsys):
    write_json(tmp_path / "run" / "all_results.json", {"eval_error": 2.5})
    write_json(tmp_path / "run" / "settings.json", {"dataset": "digits"})
    for path in (tmp_path / "run", tmp_path / "run" / "all_results.json"):
        assert main([str(path)]) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / 'run'} holds a single finished training, with a test error of 2.50 %" in error
        assert "delete" not in error and "--compare" in error


@pytest.mark.parametrize("width", [80, 100, 200])
def test_tables_are_no_wider_than_the_terminal(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    settings = {"label_noise": 0.2, "trim_keep_end": 0.1, "trim_schedule": "epoch", "learning_rate": 0.001}
    arms = [(arm, seed) for arm in ARMS[:-1] for seed in range(10)]
    records = [record(arm, seed, 5.0 + seed + len(arm), 1000.0 + seed, "fashion-mnist-vit") for arm, seed in arms]
    noisy = [{**run, "settings": settings} for run in records]
    print_report(group(records + noisy))
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("fashion-mn") for line in lines) == 4  # titles, and names of rows of the last table
    assert max(map(len, lines)) <= width
    assert any("speed-up" in line for line in lines)
    assert any("train time" in line for line in lines) == (width == 200)
    # One whole line an arm.
    assert len([line for line in lines if re.match(r"random-adaptive .* 24.50 ± 3.03 .* \(.* … .*\) .*×", line)]) == 2


def test_axes_are_linear_unless_values_span_decades(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: figures.append(figure))
    for errors in ([0.0, 0.5], [3.0, 4.0], [0.1, 50.0]):
        plot([record("plain", seed, error) for seed, error in enumerate(errors)], tmp_path / "a.png", "title")
    assert [figure.axes[0].get_yscale() for figure in figures] == ["linear", "linear", "linear"]
    history = [{"epoch": epoch, "test_error": error} for epoch, error in ((1, 90.0), (2, 9.0), (3, 0.5))]
    plot([{**record("plain", 0, 0.5), "history": history}], tmp_path / "a.png", "title")
    epochs = figures[-1].axes[0]
    assert epochs.get_yscale() == "log" and list(epochs.lines[0].get_ydata()) == [90.0, 9.0, 0.5]
    assert [epochs.yaxis.get_major_formatter()(value) for value in (0.1, 100)] == ["0.1", "100"]
