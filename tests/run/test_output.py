"""What a command shows: in a terminal of 80 columns, in a pipe, and after it was interrupted."""

import json
import logging
import re
import signal
import sys

import datasets
import pytest
import yaml

from hf_trim.run.__main__ import main
from hf_trim.run.chatter import quiet_libraries, write_chatter_to
from hf_trim.run.recipe import parse
from hf_trim.run.trainer import final_metrics, load_job_data, make_trainer
from tests.support.forked import Forked
from tests.support.recipes import TINY


@pytest.fixture(autouse=True)
def quick(no_plots):
    """No test looks at plots."""


def write(folder, recipe, **training):
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**recipe, "training": {**recipe["training"], **training}}))
    return str(path)


def screen_of(output):
    """What is left on the screen: each line as it was last drawn, with its colours as [..m]."""
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in output.split("\n")]
    return [re.sub(r"\x1b\[[A-HJKf]|\x1b\[\?\d+[hl]", "", line) for line in lines]


def test_a_comparison_in_a_terminal_of_80_columns(tmp_path):
    recipe = write(tmp_path, TINY, num_train_epochs=1)
    options = ["--compare", "--seeds", "2", "--arms", "plain", "random-adaptive", "--output_dir", tmp_path / "out"]
    environment = {"TERM": "xterm-256color", "COLUMNS": "80"}
    status, output = Forked("hf_trim.run", recipe, *options, environment=environment, columns=80).finish()
    assert status == 0, output
    assert "[1/4] plain, seed 42:" in output and "%|" in output  # the bar
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in screen_of(output.replace(str(tmp_path), "runs"))]
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    ends = [line for line in lines if line.startswith("[")]
    assert [line[:5] for line in ends] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert all(re.search(r"test error \d+\.\d\d % \(\d+ s; \d+ s left\)$", line) for line in ends[:3])
    assert ends[3].endswith(" s)")
    assert len([line for line in lines if re.match(r"(plain|random-adaptive) .* ± ", line)]) == 2
    assert "\x1b[1m" in output  # bold
    assert not [line for line in lines if "it/s" in line]


def test_a_single_training_shows_losses_and_p_and_goes_on(tmp_path, capfd):
    # No logging is asked for: 500 steps, the default of `Trainer`, would show nothing of a short training.
    training = {**TINY["training"]}
    del training["logging_strategy"]
    recipe = write(tmp_path, {**TINY, "training": training})
    command = (recipe, "--output_dir", tmp_path / "out")
    status, output = Forked("hf_trim.run", *command, kill=("step", 9)).finish()
    assert status == -signal.SIGKILL
    status, output = Forked("hf_trim.run", *command).finish()
    lines = output.splitlines()
    assert status == 0 and "Resuming from checkpoint-8 (epoch 2 of 3)" in lines, output
    assert re.search(r"(?m)^epoch 2\.25 of 3: loss \S+, of all items \S+, p 0\.2$", output)
    last = re.search(r"(?m)^epoch 3 of 3: loss \S+, of all items \S+, p 0\.2, test error (\S+) %$", output)
    assert f"Test error {last[1]} % (always the most frequent class: " in lines[-1] or lines[-2], output
    assert "%|" not in output and "{'" not in output


def test_chatter_of_libraries_is_in_the_log_file(tmp_path, capfd):
    folder = tmp_path / "base"
    assert main([write(tmp_path, TINY, num_train_epochs=1), "--output_dir", str(folder)]) == 0
    recipe = write(tmp_path, {**TINY, "model": {"model_name_or_path": str(folder)}}, num_train_epochs=1)
    # A head for other classes: transformers reports the weights that do not fit.
    noisy = ["--config_overrides", '{"num_hidden_layers": 2}', "--output_dir", str(tmp_path / "out")]
    capfd.readouterr()
    assert main([recipe, *noisy]) == 0
    printed = capfd.readouterr()
    log = (tmp_path / "out" / "run.log").read_text()
    assert "MISSING" in log and "MISSING" not in printed.out + printed.err
    assert "\x1b[" not in log  # the colours of transformers' report
    assert "Note: Trimmed batches use the" in printed.err and "Trimmed batches use the" in log


def test_a_library_that_is_imported_late_does_not_speak_to_the_terminal(tmp_path, capfd):
    with quiet_libraries():
        late = logging.getLogger("a.late.library")  # as DeepSpeed's
        late.propagate = False
        late.addHandler(logging.StreamHandler(sys.stdout))
        late.warning("Setting the accelerator")
        logging.getLogger("hf_trim.late").warning("a note")
        bar = datasets.utils.tqdm(total=9, desc="Resolving data files", file=sys.stderr)
        bar.update(9)
        bar.close()
        write_chatter_to(tmp_path / "run.log")
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == "Note: a note\n"
    assert "Setting the accelerator" in (tmp_path / "run.log").read_text()
    late.warning("later")
    assert capfd.readouterr().out == "later\n"


def test_the_last_test_is_not_run_twice(tmp_path, monkeypatch, capsys):
    job = parse(write(tmp_path, TINY, num_train_epochs=1), ["--output_dir", str(tmp_path / "out")])
    data = load_job_data(job)
    trainer = make_trainer(job, data, {}, 42, tmp_path / "out")
    trainer.train()
    again = trainer.evaluate()
    del trainer.state.log_history[-1]
    monkeypatch.setattr(trainer, "evaluate", lambda: "run again")
    metrics = final_metrics(trainer, data)
    assert {name: metrics[name] for name in ("eval_loss", "eval_error", "epoch")} == {
        name: again[name] for name in ("eval_loss", "eval_error", "epoch")
    }
    # An earlier model may have taken the place of the last one.
    trainer.args.load_best_model_at_end, trainer.state.best_global_step = True, 2
    assert final_metrics(trainer, data) == "run again"


def test_unbalanced_classes_have_their_macro_f1(tmp_path, capsys):
    arguments = [write(tmp_path, TINY, num_train_epochs=1), "--compare", "--seeds", "1", "--arms", "plain"]
    assert main([*arguments, "--max_train_samples", "30", "--output_dir", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "records" / "plain-seed42.json").read_text())
    assert 0 <= record["test_macro_f1"] < 1 and 0 < record["majority_error"] < 100
