"""
What the row-sparse backward pass may do, and what it could not do.

e.g. `x.cumsum(0)` of `[B, C]` mixes the samples. Its backward pass flips the gradient along the rows, for which there
is no rule: the gradient becomes an ordinary `[B, C]`, and `fallback_report()` is `{"aten.flip.default": 1}`. Within
`strict()` this is an error.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Settings:
    """Switches of the row-sparse backward pass, changed through [`strict`] and [`checked`]."""

    strict = False
    check_compiled = True  # whether a compiled graph's first gradients on the kept rows are compared with dense ones


FALLBACKS: Counter = Counter()  # op or autograd node → how often it ran dense for want of a rule
REFUSED_GRAPHS: Counter = Counter()  # reason → how often a compiled graph ran on the whole batch for it


def fallback_report() -> dict[str, int]:
    """
    The ops that had no row-sparse rule and ran dense, since the last reset.

    Returns:
        `dict[str, int]`: Name of the op or autograd node → how often, most frequent first.
    """
    return dict(FALLBACKS.most_common())


def reset_fallbacks() -> None:
    """Forgets the ops counted so far."""
    FALLBACKS.clear()
    REFUSED_GRAPHS.clear()


@contextmanager
def strict(enabled: bool = True) -> Iterator[None]:
    """
    Within this context, a backward pass raises where it would otherwise run an op dense.

    Args:
        enabled (`bool`, *optional*, defaults to `True`): Whether to raise.

    Raises:
        `RuntimeError`: Names the op and the shapes of its arguments.
    """
    with _setting("strict", enabled):
        yield


@contextmanager
def checked(enabled: bool = True) -> Iterator[None]:
    """
    Within this context, the first gradients of a compiled graph on the kept rows are compared with the dense ones.

    Args:
        enabled (`bool`, *optional*, defaults to `True`): Whether they are, as they are by default.
    """
    with _setting("check_compiled", enabled):
        yield


@contextmanager
def _setting(name: str, value: bool) -> Iterator[None]:
    previous = getattr(Settings, name)
    setattr(Settings, name, value)
    try:
        yield
    finally:
        setattr(Settings, name, previous)
