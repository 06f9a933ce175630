"""Wording of messages about wrong input: what was wrong, the value, and the closest right one."""

import difflib
from collections.abc import Iterable


def closest(word: str, choices: Iterable[str]) -> str:
    """
    A hint at the right word.

    Args:
        word (`str`): What was given.
        choices (`Iterable[str]`): What would have been right.

    Returns:
        `str`: `" Did you mean 'x'?"`, or an empty string if nothing is close.
    """
    matches = difflib.get_close_matches(str(word), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""


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
