"""The command line: options, recipes, wrong input, exit status; `hf-trim` and `python -m hf_trim.run`."""

import json
import re
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest
import yaml

import hf_trim
from hf_trim.__main__ import main as hf_trim_main
from hf_trim.messages import closest
from hf_trim.run.__main__ import main
from hf_trim.run.grid import expand
from hf_trim.run.recipe import RecipeParser, parse, recipe_names
from hf_trim.run.usage import TRAINING, help_text, make_help
from tests.support.forked import Forked
from tests.support.recipes import TINY


def test_command_line_overrides_the_recipe(recipe):
    job = parse(recipe, ["--num_train_epochs", "5", "--trim-keep-end", "0.4", "--compare", "--seeds", "2"])
    training, settings = job.training, job.settings
    assert (job.name, job.run.compare, job.run.seeds, job.data.dataset) == ("tiny", True, 2, "digits")
    assert (training.num_train_epochs, training.trim_keep_end, training.learning_rate) == (5, 0.4, 0.01)
    assert training.output_dir == "runs/tiny"
    assert job.model.config_overrides["patch_size"] == 4
    assert settings["num_train_epochs"] == 5 and settings["trim_keep_end"] == 0.4 and "seeds" not in settings
    command = "python -m hf_trim.run tiny.yaml"
    assert job.command == f"{command} --compare --num_train_epochs 5 --seeds 2 --trim_keep_end 0.4"
    job = parse(recipe, ["--hub_token", "hf_secret", "--output_dir", "/some/where"])
    assert "hf_secret" not in json.dumps(job.settings) + job.command and job.command == command


@pytest.mark.parametrize("name", recipe_names())
def test_each_recipe_parses(name):
    job = parse(name, [])
    assert job.model.source() and job.data.dataset and job.run.expected_time != "unknown"
    assert job.training.save_strategy == job.training.eval_strategy == "epoch"


def test_the_list_of_recipes(capsys):
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in recipe_names()) and "1 h for 192 runs on 2 CPU cores" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["digits-vti"], "Did you mean 'digits-vit'?"),
        (["no/such.yaml"], "there is no file"),
        (["--compare", "digits-vit"], "the recipe comes first"),
        (["RECIPE", "--num_trian_epochs", "3"], "'--num_trian_epochs'. Did you mean '--num_train_epochs'"),
        (["RECIPE", "--trim_select", "hardst"], "Did you mean 'hardest'?"),
    ],
)  # fmt: skip
def test_wrong_input_ends_in_one_message(arguments, message, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([recipe if argument == "RECIPE" else argument for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    "change, message",
    [
        ({"trainig": {}}, "unknown field 'trainig'.\n"),
        ({"training": {"learning_rat": 1}}, "unknown field 'learning_rat'. Did you mean 'learning_rate'?"),
        ({"recipes": "digits-vit"}, "a mapping with 'recipe', and is 'digits-vit'"),
        ({"recipes": ["digits-vit"], "vary": {"seed": 1}}, "'vary' must give each field a list of values"),
        ({"recipes": ["digits-vti"]}, "Did you mean 'digits-vit'?"),
    ],
)
def test_wrong_recipes_end_in_one_message(change, message, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**TINY, **change}))
    assert main([str(path)]) == 2
    assert message in capsys.readouterr().err
    path.write_text("model: [")
    assert main([str(path)]) == 2
    assert "is not valid YAML" in capsys.readouterr().err


@pytest.mark.extended  # a new interpreter takes long; the console script below ends in the same way
def test_no_traceback_and_exit_status_2_from_the_shell():
    done = subprocess.run([sys.executable, "-m", "hf_trim.run", "digits-vti"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    check_unknown_recipe(done.stderr)


def check_unknown_recipe(errors):
    message = errors.strip().splitlines()[-1]
    assert message.startswith("hf-trim: there is no recipe 'digits-vti'. Did you mean 'digits-vit'?")
    assert "Traceback" not in errors


@pytest.mark.extended
def test_the_console_script_is_the_module():
    project = (Path(hf_trim.__file__).parents[1] / "pyproject.toml").read_text()
    (entry_point,) = re.findall(r'(?m)^\[project\.scripts\]\nhf-trim = "(.*)"$', project)
    assert resolve_name(entry_point) is hf_trim_main
    status, output = Forked("hf_trim", "run", "digits-vti").finish()
    assert status == 2
    check_unknown_recipe(output)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_console_script_explains_itself(arguments, capsys):
    assert hf_trim_main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("usage: hf-trim run RECIPE") and printed.err == ""
    assert len(printed.out.splitlines()) < 15


def test_the_console_script_knows_its_version(capsys):
    assert hf_trim_main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf-trim {hf_trim.__version__}\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["rnu"], "hf-trim: there is no command 'rnu'. Did you mean 'run'?"),
        (["reports", "runs"], "Did you mean 'report'?"),
        (["--verison"], "hf-trim: there is no command '--verison'."),
        (["digits-vit"], "hf-trim: there is no command 'digits-vit'."),
    ],
)
def test_unknown_commands_are_refused(arguments, message, capsys):
    assert hf_trim_main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and "usage: hf-trim run" in printed.err and printed.out == ""


def test_the_console_script_passes_arguments_and_exit_status_on(tmp_path, capsys):
    assert hf_trim_main(["run", "--list"]) == 0
    assert "digits-vit" in capsys.readouterr().out
    assert hf_trim_main(["run"]) == 0
    assert capsys.readouterr().out.startswith("usage: python -m hf_trim.run")
    assert hf_trim_main(["run", "digits-vti"]) == 2
    check_unknown_recipe(capsys.readouterr().err)
    assert hf_trim_main(["report", str(tmp_path / "nothing")]) == 2
    assert "hf-trim: there is no file or folder" in capsys.readouterr().err
    for command in ("report", "bench"):
        with pytest.raises(SystemExit) as end:
            hf_trim_main([command, "--help"])
        assert end.value.code == 0 and f"usage: python -m hf_trim.{command}" in capsys.readouterr().out


def test_recipes_and_grids_of_the_readme_parse(tmp_path):
    readme = (Path(hf_trim.__file__).parent / "run" / "README.md").read_text(encoding="utf-8")
    grid, own = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "grid.yaml").write_text(grid)
    (tmp_path / "mine.yaml").write_text(own)
    assert len(expand(str(tmp_path / "grid.yaml"), [])[1]) == 6
    job = parse(str(tmp_path / "mine.yaml"), [])
    assert (job.data.label_column, job.training.trim_keep_end) == ("label", 0.2)
    commands = re.findall(r"(?m)^python -m hf_trim\.run ([\w-]+)", readme)
    assert set(commands) <= {*recipe_names(), *recipe_names("grids"), "--list", "--help"}


@pytest.mark.parametrize(
    ("word", "choices", "hint"),
    [
        ("rnu", ["run", "report"], "run"),
        ("crop_flip", ["crop", "crop-flip"], "crop-flip"),
        ("spares", ["sparse", "dense"], "sparse"),
        ("trainig", ["training_steps", "train_split", "max_train_samples"], None),
        ("easiest", ["hardest", "random"], None),
        ("--lr", ["--fp16", "--tf32"], None),
        ("lin", ["linear", "cosine"], "linear"),
        ("cos", ["cosine", "cosine_with_restarts"], None),
    ],
)
def test_only_near_words_are_suggested(word, choices, hint):
    assert closest(word, choices) == (f" Did you mean '{hint}'?" if hint else "")


def test_help_is_current_in_groups_and_narrow(recipe, capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text == make_help() == help_text(), "run `python -m hf_trim.run.usage`"
    titles = re.findall(r"(?m)^(\w+):$", text)
    assert titles == ["trimming", "run", "model", "data", "training"]
    assert max(map(len, text.splitlines())) < 80
    assert set(TRAINING) <= set(RecipeParser().names())
    for arguments in (["digits-vit", "-h"], [recipe, "--seeds", "2", "--help"]):
        assert main(arguments) == 0
        assert capsys.readouterr().out == text
    assert main(["--help_all"]) == 0
    everything = capsys.readouterr().out
    assert set(re.findall(r"(?m)^  --(\w+)", everything)) == set(RecipeParser().names())


def test_an_interruption_ends_in_one_line(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_trim.run.commands.run", interrupt)
    assert main(["digits-vit"]) == 130
    assert capsys.readouterr().err.startswith("hf-trim: Stopped. The same command goes on")
