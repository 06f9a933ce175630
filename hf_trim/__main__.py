"""`hf-trim run|init|report|bench ...`: one command for `python -m hf_trim.run`, `.run.init` and so on."""

import importlib
import sys

from hf_trim import __version__
from hf_trim.messages import closest, print_error


COMMANDS = {
    "run": "hf_trim.run.__main__", "init": "hf_trim.run.init", "report": "hf_trim.report.__main__",
    "bench": "hf_trim.bench.__main__",
}  # fmt: skip
USAGE = """usage: hf-trim run RECIPE [--compare] [--any_field value ...]
       hf-trim run --dataset DATA --model_name_or_path MODEL [--any_field value ...]
       hf-trim init RECIPE.yaml --dataset DATA
       hf-trim report RUNS... [--output FOLDER]
       hf-trim bench [--any_field value ...]
       hf-trim --version

run      train a recipe, or compare it with and without trimming (`hf-trim run --list` shows all recipes)
init     write a commented recipe for your data
report   make tables and plots of finished runs
bench    time training steps with each backward pass

`hf-trim COMMAND --help` explains the arguments of a command."""


def main(argv: list[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv (`list[str]`, *optional*): Arguments; the default is `sys.argv[1:]`.

    Returns:
        `int`: Exit status: that of the command, or 2 if there is no such command.
    """
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        print(f"hf-trim {__version__}")
        return 0
    if command not in COMMANDS:
        print_error(f"there is no command '{command}'.{closest(command, COMMANDS)}\n{USAGE}")
        return 2
    # Each command imports what it needs: data sets and plots, or only torch.
    status = importlib.import_module(COMMANDS[command]).main(arguments)
    importlib.import_module("hf_trim.processes").leave_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
