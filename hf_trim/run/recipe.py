"""Recipes: where their files are, and how a recipe and the command line become the arguments of a run."""

import argparse
import json
import re
import shlex
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from transformers import HfArgumentParser

from hf_trim.data import DataArguments
from hf_trim.messages import check_choice, closest, plain
from hf_trim.run.checks import check_arms, check_fields, check_values
from hf_trim.run.models import ModelArguments
from hf_trim.run.records import ARMS, DEFAULT_ARMS
from hf_trim.run.starter import as_yaml, starter_fields
from hf_trim.trainer.arguments import TrimmingArguments
from hf_trim.trainer.checkpoints import check_checkpoint


GROUPS = ("model", "data", "training")
RECIPE_SUFFIXES = (".yaml", ".yml")  # what tells a file from the name of a recipe of the package


@dataclass
class RunArguments:
    """
    The fields of a recipe beside those of model, data and training.

    Args:
        compare (`bool`): Train with and without trimming, and with a random subset as a control.
        arms (`list[str]`): What a comparison trains: `"plain"`, `"trimmed"` (the recipe's schedule), `"adaptive"` (p
            follows the losses), `"random"` (subsets of the size of the trimmed arm's) and, if asked for,
            `"random-adaptive"` (of the size that the adaptive rule gives), `"adaptive-skip"` (without as many of the
            hardest as labels are wrong) and `"short"` (plain, with as many epochs as the adaptive arm's cost allows).
        seeds (`int`): Number of seeds of a comparison, counted from `seed` on.
        l2_weight_decay (`float`, *optional*): Use `torch.optim.Adam` with this L2 penalty on all parameters (the
            paper's optimizer) in place of `optim`.
        lr_milestones (`list[float]`, *optional*): Epochs after which the learning rate is multiplied by `lr_gamma`,
            in place of `lr_scheduler_type`.
        lr_gamma (`float`): That factor.
        early_stopping_patience (`int`, *optional*): Stop after this number of tests in a row without a better metric
            on the validation split, and take the best model.
        show_samples (`bool`): With `trim_memory`: show texts or pictures in `hard_samples.html`, on the Hub as well.
        license (`str`, *optional*): The license in the model card.
        overwrite (`bool`): Train anew, in the place of what earlier runs left in `output_dir`.
        push_only (`bool`): Push what is in `output_dir` to the Hub, without training.
        dry_run (`bool`): Show the data, the model, the schedule and the time it will take. Nothing is trained or left.
        print_config (`bool`): Print the recipe with the changes of the command line, as YAML. Nothing is trained.
        expected_time (`str`): The time of a run, as `--list` shows it.
    """

    compare: bool = field(
        default=False, metadata={"help": "Train with and without trimming, and with a random subset as a control."}
    )
    arms: list[str] = field(
        default_factory=lambda: list(DEFAULT_ARMS),
        metadata={"help": f"What a comparison trains, of {', '.join(ARMS)}.", "choices": ARMS},
    )
    seeds: int = field(default=3, metadata={"help": "Number of seeds of a comparison, counted from --seed on."})
    l2_weight_decay: float | None = field(
        default=None,
        metadata={"help": "Use torch.optim.Adam with this L2 penalty on all parameters (the paper's optimizer)."},
    )
    lr_milestones: list[float] | None = field(
        default=None, metadata={"help": "Epochs after which the learning rate is multiplied by lr_gamma."}
    )
    lr_gamma: float = field(default=0.5, metadata={"help": "Factor of the learning rate at each milestone."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after this number of tests in a row without a better metric_for_best_model (by default the "
            "loss) on the validation split, and take the best model."
        },
    )
    show_samples: bool = field(
        default=False, metadata={"help": "With trim_memory: show texts or pictures in hard_samples.html."}
    )
    license: str | None = field(default=None, metadata={"help": "The license in the model card. Default: none."})
    overwrite: bool = field(
        default=False, metadata={"help": "Train anew, in the place of what earlier runs left in output_dir."}
    )
    push_only: bool = field(
        default=False,
        metadata={"help": "Push what is in output_dir to the Hub, without training: after a failed push."},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Show data, model, schedule and time; train nothing, leave nothing."}
    )
    print_config: bool = field(
        default=False, metadata={"help": "Print the recipe with the changes of the command line; train nothing."}
    )
    expected_time: str = field(default="unknown", metadata={"help": "The time of a run, as --list shows it."})

    def __post_init__(self):
        for arm in self.arms:
            check_choice("arms", arm, ARMS)
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, and is {self.seeds}.")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ValueError(f"early_stopping_patience must be at least 1, and is {self.early_stopping_patience}.")
        if self.l2_weight_decay is not None and self.l2_weight_decay < 0:
            raise ValueError(f"l2_weight_decay must not be negative, and is {self.l2_weight_decay}.")
        if self.lr_milestones is not None and (
            min(self.lr_milestones) <= 0 or sorted(set(self.lr_milestones)) != self.lr_milestones
        ):
            raise ValueError(f"lr_milestones must be rising positive epochs, and are {self.lr_milestones}.")
        if self.lr_gamma <= 0:
            raise ValueError(f"lr_gamma must be positive, and is {self.lr_gamma}.")


DATACLASSES = (RunArguments, ModelArguments, DataArguments, TrimmingArguments)


class RecipeError(ValueError):
    """A wrong recipe, command line or data set. The message is for the user."""


@contextmanager
def user_errors():
    """Raise each `ValueError` as a [`RecipeError`]: while a run is prepared, it is the user's to correct."""
    try:
        yield
    except ValueError as error:
        raise RecipeError(str(error)) from error


class RecipeParser(HfArgumentParser):
    """[`~transformers.HfArgumentParser`] that raises a [`RecipeError`] with the closest right word and never exits."""

    def __init__(self):
        super().__init__(DATACLASSES, prog="python -m hf_trim.run RECIPE", allow_abbrev=False)
        action = next(action for action in self._actions if action.dest == "report_to")
        action.nargs, action.default = "+", ["none"]  # several trackers, as in Python

    def error(self, message: str):
        wrong = re.match(r"argument (--\w+)\S*: invalid (\w+)(?: value)?: '(.*?)'(?: \(choose|$)", message, re.DOTALL)
        if wrong is None:
            raise RecipeError(message)
        action = next(action for action in self._actions if wrong[1] in action.option_strings)
        kind: Any = action.type
        choices = action.choices or (kind if isinstance(kind, type) and issubclass(kind, Enum) else None)
        if choices is not None:
            with user_errors():
                check_choice(action.dest, wrong[3], [getattr(choice, "value", choice) for choice in choices])
        need = {"float": "a number", "int": "a whole number"}.get(wrong[2], f"a {wrong[2]}, given in Python")
        raise RecipeError(f"{action.dest} must be {need}, and is '{wrong[3]}'.")

    def names(self) -> list[str]:
        """
        List all fields.

        Returns:
            `list[str]`: Their names.
        """
        return sorted(action.dest for action in self._actions if action.dest != "help")


def recipe_folder() -> Path:
    """
    Find the recipes that come with the package.

    Returns:
        `Path`: Their folder: inside the installed package, or beside the package in a clone.
    """
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def recipe_names(folder: str = ".") -> list[str]:
    """
    List the recipes that come with the package.

    Args:
        folder (`str`, *optional*, defaults to `"."`): `"grids"` lists the grids instead.

    Returns:
        `list[str]`: Their names.
    """
    return sorted(path.stem for path in (recipe_folder() / folder).glob("*.yaml"))


def read_recipe(recipe: str) -> tuple[str, dict]:
    """
    Read a recipe.

    Args:
        recipe (`str`): Its name, or the path of a YAML file.

    Returns:
        `tuple[str, dict]`: Its name, and the fields of all groups in one mapping.

    Raises:
        [`RecipeError`]: If there is no such recipe, or the file is not valid.
    """
    path = Path(recipe)
    if path.suffix not in RECIPE_SUFFIXES:
        names = recipe_names() + recipe_names("grids")
        if recipe not in names:
            raise RecipeError(
                f"there is no recipe '{recipe}'.{closest(recipe, names)} `python -m hf_trim.run --list` "
                "shows them all; a file of your own needs the ending .yaml."
            )
        path = recipe_folder() / ("." if recipe in recipe_names() else "grids") / f"{recipe}.yaml"
    if not path.is_file():
        raise RecipeError(f"there is no file {path}.{closest(path.stem, recipe_names())}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold the groups {', '.join(GROUPS)} with one field a line.")
    fields: dict = {}
    for key, value in content.items():
        group = value if key in GROUPS else {key: value}
        if not isinstance(group, dict):
            raise RecipeError(f"{path}: the group '{key}' must hold fields, and holds {value!r}.")
        if "columns" in group:
            fields.update(_read_columns(path, group["columns"]))
            group = {name: value for name, value in group.items() if name != "columns"}
        for name in group:
            if name in fields:
                raise RecipeError(f"{path}: the field '{name}' stands there twice.")
        fields.update(group)
    return path.stem, fields


def _read_columns(path: Path, columns: Any) -> dict:
    """`columns: {text: review, label: score}` is short for `text_column: review` and `label_column: score`."""
    uses = ("image", "text", "label")
    if not isinstance(columns, dict) or not set(columns) <= set(uses):
        raise RecipeError(f"{path}: 'columns' must map {', '.join(uses)} to names of columns, and is {columns!r}.")
    return {f"{use}_column": name for use, name in columns.items()}


def as_options(fields: dict) -> list[str]:
    """
    Write the fields of a recipe as options of a command line, so that one parser reads and checks both.

    Args:
        fields (`dict`): Names and values.

    Returns:
        `list[str]`: The options. Fields without a value are left out.
    """
    options = []
    for name, value in fields.items():
        if value is None:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        options.append(f"--{name}")
        options += [json.dumps(v) if isinstance(v, dict) else plain(v) for v in values]
    return options


# Fields on which a result does not depend, or which differ between the runs of a comparison.
NOT_SETTINGS = {"arms", "compare", "disable_tqdm", "dry_run", "expected_time", "license", "output_dir", "overwrite",
                "print_config", "project", "report_to", "resume_from_checkpoint", "run_name", "save_total_limit",
                "seed", "seeds", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id",
                "trim_select"}  # fmt: skip
# A log each twentieth of the training, so that a short one shows its losses and p too; `Trainer` logs each 500 steps.
DEFAULT_LOGGING_STEPS = 0.05
# Fields of the Hub. They are kept out of records, because one of them is the user's token.
HUB_PREFIXES = ("hub_", "push_")


class Job(NamedTuple):
    """
    A recipe with the changes of the command line.

    Args:
        name (`str`): The recipe's name.
        run ([`RunArguments`]): Arguments of the run.
        model ([`ModelArguments`]): Arguments of the model.
        data ([`DataArguments`]): Arguments of the data.
        training ([`TrimmingArguments`]): Arguments of the training.
        settings (`dict`): The fields that were set and on which a result depends.
        command (`str`): The command that repeats the run, without options of this machine and of the Hub.
        own_recipe (`str`, *optional*): The content of a recipe that does not come with the package.
    """

    name: str
    run: RunArguments
    model: ModelArguments
    data: DataArguments
    training: TrimmingArguments
    settings: dict
    command: str
    own_recipe: str | None = None

    @property
    def output_dir(self) -> Path:
        """The folder to which everything is written."""
        return Path(cast(str, self.training.output_dir))  # without one, `TrainingArguments` sets a default


def parse(recipe: str | None, command_line: list[str]) -> Job:
    """
    Make the arguments of a run. The recipe's values are defaults, which the command line overrides.

    Args:
        recipe (`str`, *optional*): Name or path of the recipe. Without one the command line gives data and model, and
            the rest is that of [`~hf_trim.run.starter.starter_fields`].
        command_line (`list[str]`): Options, e.g. `["--num_train_epochs", "3"]`.

    Returns:
        [`Job`]: The recipe's name, arguments, settings and command.

    Raises:
        [`RecipeError`]: If a field is unknown or has a wrong value.
    """
    parser = RecipeParser()
    name, options = _read_options(parser, recipe, command_line)
    with user_errors():
        check_fields(_all_set_fields(parser, options))
        try:
            run, model, data, training, unknown = parser.parse_args_into_dataclasses(
                options, look_for_args_file=False, return_remaining_strings=True
            )
        except (OSError, RuntimeError, TypeError) as error:  # of what mappings and files hold
            raise RecipeError(str(error)) from error
    if unknown:
        choices = [option for action in parser._actions for option in action.option_strings]
        raise RecipeError(f"unknown argument '{unknown[0]}'.{closest(unknown[0].split('=')[0], choices)}")
    if run.show_samples and not training.trim_memory:
        raise RecipeError("--show_samples has no effect without --trim_memory: add that, or leave --show_samples out.")
    if run.overwrite and run.push_only:
        raise RecipeError("--overwrite deletes what --push_only would push: leave one of them out.")
    if run.overwrite and training.resume_from_checkpoint is not None:
        raise RecipeError("--overwrite starts anew, and --resume_from_checkpoint goes on: leave one of them out.")
    asked = _set_fields(parser, command_line)
    for key in ("arms", "seeds"):
        if key in asked and not run.compare:
            raise RecipeError(f"--{key} has no effect without --compare: add that, or leave --{key} out.")
    if training.resume_from_checkpoint is not None:
        if run.compare:
            raise RecipeError(
                "--resume_from_checkpoint has no effect with --compare, whose runs go on from their own checkpoints: "
                "leave it out."
            )
        with user_errors():
            check_checkpoint(training.resume_from_checkpoint)
    given = _set_fields(parser, options)
    with user_errors():
        if run.compare and run.arms != list(DEFAULT_ARMS):
            check_arms(run.arms, training, data.label_noise, run.early_stopping_patience is not None)
        check_values(training, data.task, given)
    if not {"logging_steps", "logging_strategy"} & given.keys():
        training.logging_steps = DEFAULT_LOGGING_STEPS
    settings = {key: value for key, value in given.items() if key not in NOT_SETTINGS}
    hidden = NOT_SETTINGS - {"arms", "compare", "seed", "seeds", "trim_select"}
    changes = {key: value for key, value in asked.items() if key not in hidden}
    command = ["python", "-m", "hf_trim.run", *([Path(recipe).name] if recipe else []), *as_options(changes)]
    return Job(name, run, model, data, training, settings, shlex.join(command), _own_recipe(recipe))


def _own_recipe(recipe: str | None) -> str | None:
    """The content of a recipe that does not come with the package, for the model card."""
    if recipe is None or Path(recipe).suffix not in RECIPE_SUFFIXES:
        return None
    private = ("output_dir", *HUB_PREFIXES)
    fields = {name: value for name, value in read_recipe(recipe)[1].items() if not name.startswith(private)}
    return as_yaml(group_fields(fields)).rstrip()


def default_values() -> dict:
    """
    Look up the defaults of all fields.

    Returns:
        `dict`: Names and values.
    """
    parser = RecipeParser()
    return {name: parser.get_default(name) for name in parser.names()}


def fields_to_run(recipe: str | None, command_line: list[str]) -> dict[str, Any]:
    """
    Args:
        recipe (`str`, *optional*): Name or path of the recipe.
        command_line (`list[str]`): Options.

    Returns:
        `dict`: The fields that are set by them, without the user's token.
    """
    parser = RecipeParser()
    fields = _all_set_fields(parser, _read_options(parser, recipe, command_line)[1])
    if isinstance(fields.get("config_overrides"), str):
        fields["config_overrides"] = json.loads(fields["config_overrides"])
    return {name: value for name, value in fields.items() if name not in ("hub_token", "dry_run", "print_config")}


def group_fields(fields: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """
    Args:
        fields (`dict`): Fields of a recipe.

    Returns:
        `dict[str, dict]`: The fields of each of `GROUPS`; those that are in none of them under `""`, which is first.
    """
    dataclass_of = dict(zip(("", *GROUPS), DATACLASSES, strict=True))
    names = {group: [x.name for x in dataclass_fields(cls)] for group, cls in dataclass_of.items()}
    return {group: {name: fields[name] for name in names[group] if name in fields} for group in names}


def _read_options(parser: RecipeParser, recipe: str | None, command_line: list[str]) -> tuple[str, list[str]]:
    """The name of a run, and its recipe and command line as options of one parser."""
    if recipe is not None:
        name, fields = read_recipe(recipe)
        for key in fields:
            if key not in parser.names():
                raise RecipeError(f"the recipe {name} has an unknown field '{key}'.{closest(key, parser.names())}")
    elif not any(option.split("=")[0] == "--dataset" for option in command_line):
        raise RecipeError(
            "the recipe comes first; without one, give --dataset and a model (--model_name_or_path, --model_type or "
            "--timm_model)."
        )
    else:
        name, fields = starter_fields(_all_set_fields(parser, command_line))
    options = as_options({"output_dir": f"runs/{name}", **fields}) + command_line
    asked = _all_set_fields(parser, options)
    if asked.get("early_stopping_patience") is not None and "load_best_model_at_end" not in asked:
        options.append("--load_best_model_at_end")
        asked["load_best_model_at_end"] = True
    if asked.get("load_best_model_at_end") and not {"validation_split", "validation_fraction"} & set(asked):
        options += ["--validation_split", "auto"]  # the test split must not choose the model
    return name, options


def _all_set_fields(parser: RecipeParser, options: list[str]) -> dict[str, Any]:
    """The fields that the options set."""
    # A field that still has this value after parsing was not set.
    unset = object()
    unknown_too, _ = parser.parse_known_args(options, argparse.Namespace(**dict.fromkeys(parser.names(), unset)))
    return {key: value for key, value in vars(unknown_too).items() if value is not unset}


def _set_fields(parser: RecipeParser, options: list[str]) -> dict[str, Any]:
    """The same without those of the Hub."""
    return {k: v for k, v in _all_set_fields(parser, options).items() if not k.startswith(HUB_PREFIXES)}
