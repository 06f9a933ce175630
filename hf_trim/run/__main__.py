"""`python -m hf_trim.run RECIPE`: train a recipe, or compare it with and without trimming."""

import importlib
import sys

from hf_trim.run.usage import help_text


def main(argv: list[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv (`list[str]`, *optional*): Arguments; the default is `sys.argv[1:]`.

    Returns:
        `int`: Exit status: 0; 2 if the recipe, an argument or the data is wrong; 1 if the Hub took nothing or a file
            could not be written.
    """
    options = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if {"-h", "--help", "--help_all"} & set(options):
        print(help_text("--help_all" in options), end="")
        return 0
    recipe = None if options[0].startswith("-") else options.pop(0)
    # Imported late, since it takes seconds.
    return importlib.import_module("hf_trim.run.commands").run_command(recipe, options)


if __name__ == "__main__":
    status = main()
    importlib.import_module("hf_trim.processes").leave_process_group()
    sys.exit(status)
