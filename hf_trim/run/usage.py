"""
The text of `hf-trim run --help`. It is kept in `help.txt`: what defines half of the fields takes seconds to import.
`python -m hf_trim.run.usage` writes that file, and a test compares it.
"""

import textwrap
from pathlib import Path


FILE = Path(__file__).with_name("help.txt")
USAGE = """usage: python -m hf_trim.run RECIPE [--compare] [--seeds N] [--field value ...]
       python -m hf_trim.run --dataset DATA --model_name_or_path MODEL [...]
       python -m hf_trim.run GRID [--seeds N] [--field value ...]
       python -m hf_trim.run --list

RECIPE is a name that --list shows, or the path of a YAML file (`hf-trim init`
writes one). Its values are defaults that the command line overrides. `hf-trim
run` is short for `python -m hf_trim.run`."""
# The fields of `TrainingArguments` that are used most. Their own help differs between versions of transformers.
TRAINING = {
    "output_dir": "Where everything goes. Default: runs/RECIPE.",
    "seed": "Sets weights, data order and dropout.",
    "num_train_epochs": "How often the training goes through the data.",
    "max_steps": "The number of steps, in place of epochs.",
    "per_device_train_batch_size": "Samples in a mini-batch.",
    "per_device_eval_batch_size": "The same for tests.",
    "gradient_accumulation_steps": "Mini-batches whose gradients are added up for one step.",
    "learning_rate": "The learning rate at its highest.",
    "lr_scheduler_type": "How it falls: linear, cosine, constant, ...",
    "warmup_steps": "Steps in which it rises first.",
    "weight_decay": "Weight decay of AdamW.",
    "optim": "Another optimizer.",
    "bf16": "Compute in bfloat16.",
    "use_cpu": "Leave the GPU alone.",
    "torch_compile": "Compile the model.",
    "gradient_checkpointing": "Less memory for more time.",
    "dataloader_num_workers": "Processes that load the data.",
    "eval_strategy": "When to test: no, steps or epoch.",
    "save_strategy": "When to write a checkpoint: no, steps or epoch.",
    "save_total_limit": "How many checkpoints are kept.",
    "logging_strategy": "When to log: no, steps or epoch.",
    "load_best_model_at_end": "Take the model that was best on the validation split.",
    "metric_for_best_model": "What best means: loss, error, accuracy or perplexity.",
    "resume_from_checkpoint": "Go on from this checkpoint. Default: the last complete one in output_dir.",
    "report_to": "Trackers, one or several: tensorboard, wandb, mlflow, ...",
    "push_to_hub": "Upload the results to the Hub.",
    "hub_model_id": "Their name there.",
}
TITLES = {"": "run", "model": "model", "data": "data"}
WIDTH, INDENT = 79, 28


def help_text(full: bool = False) -> str:
    """
    Explain the command line.

    Args:
        full (`bool`, *optional*, defaults to `False`): With the rarer fields of `TrainingArguments`.

    Returns:
        `str`: All fields, in groups.
    """
    return make_help(full) if full else FILE.read_text(encoding="utf-8")


def make_help(full: bool = False) -> str:
    """
    Write the help.

    Args:
        full (`bool`, *optional*, defaults to `False`): With all fields of `TrainingArguments`.

    Returns:
        `str`: The help.
    """
    from hf_trim.run.recipe import RecipeParser, group_fields

    actions = {action.dest: action for action in RecipeParser()._actions if action.dest != "help"}
    groups = group_fields(actions)
    training = groups.pop("training")
    blocks = [USAGE, _block("trimming", {n: a.help for n, a in training.items() if n.startswith("trim_")}, actions)]
    for group, fields in groups.items():
        blocks.append(_block(TITLES[group], {name: action.help for name, action in fields.items()}, actions))
    if full:
        others = {name: action.help for name, action in training.items() if not name.startswith("trim_")}
        blocks.append(_block("training", others, actions))
    else:
        blocks.append(_block("training", TRAINING, {}))
        blocks.append("All other fields of transformers' TrainingArguments: `hf-trim run --help_all`.")
    return "\n\n".join(blocks) + "\n"


def _block(title: str, helps: dict, actions: dict) -> str:
    lines = [f"{title}:"]
    for name, text in helps.items():
        action = actions.get(name)
        text = " ".join(str(text).split())
        if action is not None and action.choices:
            text += f" One of {', '.join(map(str, action.choices))}."
        if action is not None and not isinstance(action.default, (type(None), bool, list, dict)):
            text += f" Default: {action.default}."
        option = f"  --{name}"
        filled = textwrap.wrap(text, WIDTH - INDENT, break_on_hyphens=False)
        if len(option) >= INDENT - 1:
            lines.append(option)
        else:
            filled[:1] = [option.ljust(INDENT) + "".join(filled[:1])]
            lines.append(filled.pop(0))
        lines += [" " * INDENT + line for line in filled]
    return "\n".join(lines)


if __name__ == "__main__":
    FILE.write_text(make_help(), encoding="utf-8")
