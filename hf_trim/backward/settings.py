"""
What the row-sparse backward pass may do, and what it could not do.

e.g. `x.cumsum(0)` of `[B, C]` mixes the samples. Its backward pass flips the gradient along the rows, for which there
is no rule: the gradient becomes an ordinary `[B, C]`, and `fallback_report()` is `{"aten.flip.default": 1}`. Within
`strict()` this is an error.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from hf_trim.backward._torch_internals import context_of_backward


@dataclass(frozen=True)
class Settings:
    """
    Switches of the row-sparse backward pass, changed through [`strict`], [`checked`] and [`taped`], and what it
    counted.

    Args:
        strict (`bool`, *optional*, defaults to `False`): Whether an op without a rule is an error.
        check_compiled (`bool`, *optional*, defaults to `True`):
            Whether a compiled graph's first gradients on the kept rows are compared with dense ones.
        tape (`bool`, *optional*, defaults to `False`):
            Whether a backward pass that repeats itself is recorded, and then run from C++.
        fallbacks (`Counter`, *optional*): Op or autograd node → how often it ran dense for want of a rule.
        refused_graphs (`Counter`, *optional*): Reason → how often a compiled graph ran on the whole batch for it.
    """

    strict: bool = False
    check_compiled: bool = True
    tape: bool = False
    fallbacks: Counter = field(default_factory=Counter)
    refused_graphs: Counter = field(default_factory=Counter)


_SETTINGS: ContextVar[Settings | None] = ContextVar("hf_trim_backward_settings", default=None)


def current_settings() -> Settings:
    """
    The settings and counters of this thread (of this context, see `contextvars`). Autograd runs the backward pass of a
    GPU in a thread of its own: there they are those of the thread that called `backward`.

    Returns:
        [`Settings`]: Shared by all who ask in this thread.
    """
    context = context_of_backward()
    settings = (context and context.get(_SETTINGS)) or _SETTINGS.get() or Settings()
    _SETTINGS.set(settings)  # a backward pass that begins in autograd's thread has them too
    return settings


def fallback_report() -> dict[str, int]:
    """
    The ops that had no row-sparse rule and ran dense in this thread, since the last reset.

    Returns:
        `dict[str, int]`: Name of the op or autograd node → how often, most frequent first.
    """
    return dict(current_settings().fallbacks.most_common())


def refused_graphs() -> dict[str, int]:
    """
    Why compiled graphs ran on the whole batch in this thread, since the last reset.

    Returns:
        `dict[str, int]`: Reason → how often, the first one first.
    """
    return dict(current_settings().refused_graphs)


def reset_fallbacks() -> None:
    """Forgets the ops and graphs counted so far in this thread."""
    current_settings().fallbacks.clear()
    current_settings().refused_graphs.clear()


@contextmanager
def strict(enabled: bool = True) -> Iterator[None]:
    """
    Within this context, a backward pass that this thread starts raises where it would otherwise run an op dense.

    Args:
        enabled (`bool`, *optional*, defaults to `True`): Whether to raise.

    Raises:
        `RuntimeError`: Names the op and the shapes of its arguments.
    """
    with _changed(strict=enabled):
        yield


@contextmanager
def checked(enabled: bool = True) -> Iterator[None]:
    """
    Within this context, the first gradients of a compiled graph on the kept rows are compared with the dense ones.

    Args:
        enabled (`bool`, *optional*, defaults to `True`): Whether they are, as they are by default.
    """
    with _changed(check_compiled=enabled):
        yield


@contextmanager
def taped(enabled: bool = True) -> Iterator[None]:
    """
    Within this context, a row-sparse backward pass that repeats itself is recorded, and then run from C++: the host
    has less to do, and the gradients are the same. It needs a C++ compiler; without one, all is as before.

    Args:
        enabled (`bool`, *optional*, defaults to `True`): Whether it is.
    """
    with _changed(tape=enabled):
        yield


@contextmanager
def _changed(**changes: Any) -> Iterator[None]:
    token = _SETTINGS.set(replace(current_settings(), **changes))
    try:
        yield
    finally:
        _SETTINGS.reset(token)
