"""Messages: about wrong input what is wrong, its value, and the closest right value; and how numbers are written."""

import difflib
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import TextIO


def closest(word: str, choices: Iterable[str]) -> str:
    """
    A hint at the word that was probably meant.

    Args:
        word (`str`): The wrong word.
        choices (`Iterable[str]`): The right words.

    Returns:
        `str`: `" Did you mean 'x'?"`, or an empty string if no choice is close.
    """
    names = [str(choice) for choice in choices]
    matches = difflib.get_close_matches(str(word), names, n=1, cutoff=0.75)
    starting = [name for name in names if len(str(word).lstrip("-")) > 2 and name.startswith(str(word))]
    matches += starting if len(starting) == 1 else []  # the beginning of one word
    # Swapped letters weigh too much in short words.
    matches += [name for name in names if sorted(name) == sorted(str(word))]
    return f" Did you mean '{matches[0]}'?" if matches else ""


def print_error(message: object) -> None:
    """
    Print why a command ends.

    Args:
        message: The reason.
    """
    name = "hf-trim:"
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        name = f"\033[1;31m{name}\033[0m"
    print(f"{name} {message}", file=sys.stderr)


def wrap(text: str, stream: TextIO) -> str:
    """
    Break long lines between words where they are for a terminal.

    Args:
        text (`str`): The text.
        stream (`TextIO`): Where it is written.

    Returns:
        `str`: The text, with lines no wider than the terminal; unchanged if it is none.
    """
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(textwrap.fill(line, width, subsequent_indent="  ") for line in text.splitlines())


def signed(value: float) -> str:
    """
    Write a difference.

    Args:
        value (`float`): The difference.

    Returns:
        `str`: It with its sign and two digits after the point.
    """
    return f"{value:+.2f}".replace("-", "−")  # a minus sign is as wide as a plus


def shorten(text: str, width: int) -> str:
    """
    Fit a text into one line.

    Args:
        text (`str`): The text.
        width (`int`): Its longest length in characters.

    Returns:
        `str`: The text with single spaces, cut if it is longer.
    """
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 1]}…"


def plain(value: object) -> str:
    """
    Write a value as people do.

    Args:
        value: A value of a field.

    Returns:
        `str`: It, without `.0` if it is a whole number.
    """
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """
    Refuse a value that is not among the choices.

    Args:
        name (`str`): The argument's name.
        value (`str`): Its value.
        choices (`Iterable[str]`): The values it may have.

    Raises:
        `ValueError`: If `value` is not among `choices`.
    """
    if value not in choices:
        listed = ", ".join(f"'{choice}'" for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, and is {value!r}.{closest(value, choices)}")
