"""How well remembered losses find wrong labels: the numbers of the table."""

import json

import numpy as np
import pytest

from tests.support import label_errors


def test_wrong_labels_are_counted_among_the_first():
    is_wrong = np.array([False, True, False, True, False])
    assert label_errors.scores_of(is_wrong, np.array([3, 1, 0, 2, 4])) == {"precision": 1, "average_precision": 1}
    half = label_errors.scores_of(is_wrong, np.array([3, 0, 1, 2, 4]))
    assert half["precision"] == 0.5 and half["average_precision"] == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.extended
def test_the_table_of_wrong_labels(recipe, tmp_path, capsys):
    rows = tmp_path / "rows.json"
    options = ["--max_train_samples", "128", "--num_train_epochs", "4"]
    label_errors.main([recipe, "--noise", "0.25", "--seeds", "1", "--output", str(rows), *options])
    found = json.loads(rows.read_text())
    assert len(found) == len(label_errors.ARMS) * len(label_errors.RANKINGS)
    assert all(row["precision"] > 0.25 and row["average_precision"] > 0.25 for row in found)  # as at random
    assert f"| {recipe} | 25 % | plain | mean_loss | " in capsys.readouterr().out
