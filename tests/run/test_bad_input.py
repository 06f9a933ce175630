"""Wrong configurations and data: each ends before the first step, with one message that names field and fix."""

import json

import datasets
import pytest
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_trim.run.__main__ import main
from tests.support.recipes import TEXT, TINY


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


# Command line → the field, and what to do.
OPTIONS = [
    (["--trim_keep_start", "1.5"], "trim_keep_start must be a fraction in (0, 1], and is 1.5"),
    (["--trim_keep_end", "0"], "trim_keep_end must be a fraction in (0, 1], and is 0.0: 0.2 keeps a fifth"),
    (["--trim_keep_end", "-0.2"], "trim_keep_end must be a fraction"),
    (["--trim_keep_end", "nan"], "trim_keep_end must be a fraction in (0, 1], and is nan"),
    (["--trim_keep_end", "20%"], "trim_keep_end must be a number, and is '20%'"),
    (
        ["--trim_keep_start", "0.3", "--trim_keep_end", "0.5"],
        "trim_keep_end (0.5) must not be above trim_keep_start (0.3)",
    ),
    (["--trim_schedule", "steps"], "Did you mean 'step'?"),
    (["--trim_mass", "0.9"], "trim_mass=0.9 has no effect with trim_schedule='epoch'"),
    (["--arms", "plain", "adaptve", "--compare"], "Did you mean 'adaptive'?"),
    (["--arms", "plain", "adaptive"], "--arms has no effect without --compare"),
    (["--seeds", "2"], "--seeds has no effect without --compare"),
    (["--trim_schedule", "adaptive", "--compare", "--arms", "plain", "adaptive"], "ask for trimmed, which is the"),
    (["--compare", "--arms", "plain", "adaptive-skip"], "no label is: give label_noise"),
    (["--compare", "--arms", "plain", "short"], "whose cost it takes"),
    (["--compare", "--arms", "plain", "trimmed", "short", "--early_stopping_patience", "2"], "leave one of them out"),
    (["--compare", "--arms", "plain", "trimmed", "short", "--max_steps", "5"], "max_steps says how long all"),
    (["--trim_select", "easiest"], "trim_select must be one of 'hardest', 'random', 'none', and is 'easiest'.\n"),
    (["--trim_unit", "word"], "trim_unit must be one of 'auto', 'sample', 'token', and is 'word'"),
    (["--trim_unit", "token"], "trim_unit='token' needs a loss per token"),
    (["--trim_backward", "spares"], "Did you mean 'sparse'?"),
    (["--trim_backward", "dense", "--trim_strict"], "trim_strict needs trim_backward='sparse'"),
    (["--trim_nonfinite", "ignore"], "and is 'ignore'"),
    (["--trim_scope", "globl"], "Did you mean 'global'?"),
    (["--trim_scope", "global", "--average_tokens_across_devices", "false"], "average_tokens_across_devices at True"),
    (["--num_train_epochs", "three"], "num_train_epochs must be a number, and is 'three'"),
    (["--per_device_train_batch_size", "8.5"], "per_device_train_batch_size must be a whole number, and is '8.5'"),
    (["--per_device_eval_batch_size", "0"], "per_device_eval_batch_size must be at least 1, and is 0"),
    (["--num_train_epochs", "0"], "num_train_epochs must be above 0"),
    (["--max_steps", "0"], "max_steps must be at least 1, or -1"),
    (["--seed", "-1"], "seed must be at least 0"),
    (["--output_dir", __file__], "output_dir must be a folder"),
    (["--load_best_model_at_end", "True", "--metric_for_best_model", "eror"], "Did you mean 'error'?"),
    (["--metric_for_best_model", "error", "--greater_is_better", "True"], "would take the worst model"),
    (["--report_to", "tensorbord"], "Did you mean 'tensorboard'?"),
    (["--report_to", "swanlab"], "report_to 'swanlab': "),
    (["--early_stopping_patience", "2", "--eval_strategy", "no"], "patience needs tests and checkpoints"),
    (["--report_to", "tensorboard", "mlfow"], "Did you mean 'mlflow'?"),
    (["--report_to", "tensorboard,none"], "report_to must be 'none', 'all' or names of trackers"),
    (["--bf16", "--fp16"], "fp16 and bf16 exclude each other: leave one of them out"),
    (["--lr_scheduler_type", "lin"], "'greedy', and is 'lin'. Did you mean 'linear'?"),
    (["--lr_scheduler_type", "warmup_stable_decay"], "'num_decay_steps'; its values are set by lr_scheduler_kwargs"),
    (["--lr_scheduler_kwargs", "{bad"], "lr_scheduler_kwargs is no valid JSON"),
    (["--lr_scheduler_kwargs", "bad"], "lr_scheduler_kwargs must be a mapping in JSON, such as"),
    (["--lr_scheduler_kwargs", '{"x": 1}'], "lr_scheduler_type 'linear' cannot be used: "),
    (["--optim", "nonsense"], "and is 'nonsense'.\n"),
    (["--optim", "adafctor"], "Did you mean 'adafactor'?"),
    (["--optim", "schedule_free_adamw"], "optim 'schedule_free_adamw' cannot be used: You need to install"),
    (["--optim_args", "bad"], "optim 'adamw_torch_fused' cannot be used: "),
    (["--adam_beta1", "2"], "adam_beta1 must be at least 0 and below 1, and is 2.0"),
    (["--debug", "x"], "debug must be one of 'underflow_overflow', 'tpu_metrics_debug', and is 'x'"),
    (["--parallelism_config", "x"], "parallelism_config must be a ParallelismConfig, given in Python"),
    (["--accelerator_config", "none.json"], "must be a mapping in JSON or a file, and there is no file 'none.json'"),
    (["--accelerator_config", '{"x": 1}'], "unexpected keyword argument 'x'"),
    (
        ["--activation_checkpointing", "--activation_checkpointing_kwargs", '{"x": 1}'],
        "activation_checkpointing_kwargs cannot be used",
    ),
    (["--torch_compile_backend", "inductr"], "Did you mean 'inductor'?"),
    (["--torch_compile_mode", "fast"], "torch_compile_mode cannot be used: Unrecognized mode=fast"),
    (["--save_strategy", "best"], "save_strategy='best' needs a metric_for_best_model"),
    (["--load_best_model_at_end", "--save_strategy", "steps"], "They are 'epoch' and 'steps'"),
    (
        ["--load_best_model_at_end", "--save_strategy", "steps", "--eval_strategy", "steps", "--eval_steps", "3",
         "--save_steps", "4"],
        "save_steps must be a multiple of eval_steps",
    ),
    (["--logging_strategy", "steps", "--logging_steps", "2.5"], "logging_steps must be a whole number from 1, or a"),
    (["--num_train_epochs", "inf"], "num_train_epochs must be above 0, and finite, and is inf"),
    (["--label_smoothing_factor", "2"], "label_smoothing_factor must be between 0 and 1"),
    (["--eval_accumulation_steps", "0"], "eval_accumulation_steps must be at least 1"),
    (["--prediction_loss_only"], "prediction_loss_only has no place here"),
    (["--label_names", "x"], "label_names has no place here"),
    (["--dataloader_persistent_workers"], "set dataloader_num_workers"),
    (["--dataloader_drop_last", "--per_device_train_batch_size", "99"], "leaves nothing of 64 samples"),
    (["--learning_rat", "0.1"], "Did you mean '--learning_rate'?"),
    (["--lr_milestones", "9", "3"], "lr_milestones must be rising"),
    (["--l2_weight_decay", "-1"], "l2_weight_decay must not be negative"),
    (["--seeds", "0", "--compare"], "seeds must be at least 1"),
    (["--save_strategy", "epochs"], "Did you mean 'epoch'?"),
    (["--use_liger_kernel"], "use_liger_kernel=True replaces the loss"),
    (["--config_overrides", '{"hiden_size": 16}'], "Did you mean 'hidden_size'?"),
    (["--dataset", "digit"], "Did you mean 'digits'?"),
    (["--dataset", "./missing.csv"], "looks like a local path, and there is no such file"),
    (["--train_split", "trian"], "Did you mean 'train'?"),
    (["--test_split", "dev"], "test_split 'dev' is not in dataset"),
    (["--image_column", "picture"], "image_column 'picture' is not a column"),
    (["--label_column", "lable"], "Did you mean 'label'?"),
    (["--image_channels", "2"], "image_channels must be 1 (grey) or 3 (colour), and is 2"),
    (["--image_size", "0"], "image_size must be a whole number from 1"),
    (["--image_std", "0"], "image_std must be above 0"),
    (["--image_mean", "0.5", "0.5"], "image_mean must be a list of 1 numbers"),
    (["--test_split", "train"], "test_split must differ from train_split"),
    (["--image_column", "image", "--text_column", "label"], "exclude each other"),
    (["--text_column", "image"], "text_column 'image' must hold strings"),
    (["--split_seed", "-1"], "split_seed must be"),
    (["--dataset", ""], "dataset must be"),
    (["--test_fraction", "1.5"], "test_fraction must lie between 0 and 1"),
    (["--test_fraction", "0.001"], "leave no room for 10 classes"),
    (["--label_noise", "1"], "label_noise must lie in [0, 1)"),
    (["--max_train_samples", "0"], "max_train_samples must be a whole number from 1"),
    (["--augment", "flip"], "and is 'flip'"),
    (["--task", "causal-lm"], "task 'causal-lm' needs texts, and dataset 'digits' holds images"),
    (["--push_only"], "holds no finished training: run the recipe without --push_only first"),
]  # fmt: skip


@pytest.mark.parametrize("options, message", OPTIONS, ids=lambda value: " ".join(value) if type(value) is list else "")
def test_wrong_options(options, message, tmp_path, capsys):
    check(TINY, options, message, tmp_path, capsys)


def check(recipe, options, message, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    assert main([str(path), "--output_dir", str(tmp_path / "out"), *options]) == 2
    printed = capsys.readouterr()
    last = [line for line in printed.err.splitlines() if line.startswith("hf-trim: ")]
    assert len(last) == 1 and message in printed.err and "Traceback" not in printed.err
    assert len(last[0]) < 1500 and "Strategy." not in printed.err
    assert "'loss'" not in printed.out and not list((tmp_path / "out").glob("checkpoint-*"))


LABELS = ClassLabel(names=["a", "b"])


def texts(values, feature=None, name="label", **more):
    columns = {"text": [f"text number {i}" for i in range(len(values))], name: values, **more}
    features = {
        "text": Value("string"),
        name: feature or Value("int64"),
        **{column: Value("int64") for column in more},
    }
    return Dataset.from_dict(columns, features=Features(features))


# Training split, test split → the field, and what to do.
DATA = {
    "labels that are missing": (texts([0, None] * 8), None, "label_column 'label' is empty in 8 of 16 rows"),
    "labels out of range": (texts([0, 1] * 8), texts([0, 2]), "none of the 2 classes: 2. Choose another split"),
    "labels held back": (texts([0, 1] * 8, LABELS), texts([-1, -1], LABELS), "usually means that the labels are held"),
    "label maps that differ": (
        texts([0, 1] * 8, LABELS), texts([0, 1], ClassLabel(names=["b", "a"])), "save both with the same classes",
    ),
    "one class": (texts([1] * 8), None, "one class only in the 8 rows of the training split"),
    "one sample of a class": (texts([0] * 8 + [1]), None, "cannot be split by class: the class '1' has one sample"),
    "no rows": (texts([]), None, "is empty: choose another"),
    "no labels": (texts([0, 1] * 8).remove_columns("label"), None, "label_column must be given"),
    "no texts": (texts([0, 1] * 8).remove_columns("text"), None, "text_column (or image_column) must be given"),
    "two columns of labels": (
        texts([0, 1] * 8, LABELS, "first").add_column("second", [0, 1] * 8, feature=LABELS), None,
        "label_column must be given for dataset",
    ),
    "a test split of other columns": (
        texts([0, 1] * 8), texts([0, 1]).rename_column("text", "body"), "The test split lacks the column text",
    ),
    "a text that is missing": (
        Dataset.from_dict({"text": ["a", None] * 8, "label": [0, 1] * 8}), None,
        "Row 1 of the training split has no text: text_column 'text' is empty in 6 of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_wrong_data(name, tmp_path, capsys):
    train, test, message = DATA[name]
    DatasetDict({"train": train} | ({"test": test} if test is not None else {})).save_to_disk(tmp_path / "data")
    check(TEXT, ["--dataset", str(tmp_path / "data")], message, tmp_path, capsys)


# Recipe → what is wrong.
RECIPES = {
    "no YAML": ("model: [", "is not valid YAML"),
    "tabs": ("model:\n\tmodel_type: vit", "is not valid YAML"),
    "a list": ("- model_type: vit", "must hold the groups model, data, training"),
    "empty": ("", "must hold the groups model, data, training"),
    "a group that is no mapping": ("training: 5", "the group 'training' must hold fields, and holds 5"),
    "a field that there is not": (yaml.safe_dump({**TINY, "trim_keep_ende": 0.2}), "Did you mean 'trim_keep_end'?"),
    "a field twice": (yaml.safe_dump({**TINY, "dataset": "digits"}), "the field 'dataset' stands there twice"),
    "a word for a number": (
        yaml.safe_dump({**TINY, "trim_keep_end": "low"}),
        "trim_keep_end must be a number, and is 'low'",
    ),
    "no model": (yaml.safe_dump({"dataset": "digits"}), "No model is given: give exactly one of"),
    "a grid to push": ("recipes: [digits-vit]\npush_to_hub: true", "a grid is not pushed: leave push_to_hub"),
    "a grid of nothing": ("recipes: []", "'recipes' must be a list of recipes"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_wrong_recipes(name, tmp_path, capsys):
    recipe, message = RECIPES[name]
    check(recipe, [], message, tmp_path, capsys)


def test_a_file_that_is_no_text(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    assert main([str(tmp_path / "mine.yaml")]) == 2
    assert "is not valid YAML" in capsys.readouterr().err


def test_broken_records_and_settings(tmp_path, capsys):
    out = tmp_path / "out"
    (out / "records").mkdir(parents=True)
    (out / "records" / "plain-seed42.json").write_text(json.dumps({"arm": "plain"})[:9])
    check(TINY, ["--compare", "--seeds", "1"], "is no record of a finished run", tmp_path, capsys)
    (out / "settings.json").write_text("{")
    check(
        TINY, [], "settings.json is not valid JSON: choose another --output_dir, or add --overwrite", tmp_path, capsys
    )
