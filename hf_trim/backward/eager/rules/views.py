"""
Views that rules are written for by hand; those of the others follow from the facts. The same rules serve
gradients and activations: a view never depends on what the other rows hold.

e.g. `[B, T, C]` viewed as `[B·T, C]`, B = 4, T = 2, rows 1 and 3 kept: the payload `[2, T, C]` becomes `[2·2, C]`,
with rows along dimension 0 and `row_inner = 2`. Viewed as `[B, T·C]`, `row_inner` stays 1. As `[2, 2, T, C]` the rows
themselves would be split: the op runs dense.
"""

from math import prod

from hf_trim.backward.facts.fact import squeezed, squeezed_dims
from hf_trim.backward.registry import ACTIVATIONS, GRADIENTS, NotRowwiseError, implements


@implements("lift_fresh", table=(GRADIENTS, ACTIVATIONS))
def lift_fresh(func, x):
    return x


@implements("squeeze", "squeeze.dim", "squeeze.dims", table=(GRADIENTS, ACTIVATIONS))
def squeeze(func, x, dim=None):
    return x.like(x.payload.squeeze(squeezed_dims(x, dim)), squeezed(x, dim))


@implements("view", "_unsafe_view", "_reshape_alias", table=(GRADIENTS, ACTIVATIONS))
def view(func, x, size, stride=None):
    key = ("view", x.shape, x.row_dim, x.row_outer, x.row_inner, *size)
    plan = x.rows.plans.get(key)
    if plan is None:
        plan = x.rows.plans[key] = plan_view(x, list(size))
    size, *layout = plan
    return type(x)(x.payload.view(size), x.rows, *layout)


def plan_view(x, size: list[int]) -> tuple:
    """
    Finds the dimension of a view that the rows begin in.

    e.g. `[B, T, C]` → `[B·T, C]`: size B·T is a multiple of B, and T of what is behind the rows fits into it.

    Returns:
        `tuple`: The payload's size, and `row_dim`, `row_outer` and `row_inner` of the view.

    Raises:
        `NotRowwiseError`: If the view splits the rows themselves.
    """
    if -1 in size:
        size[size.index(-1)] = x.numel() // -prod(size)
    before, after = x.row_outer, x.row_inner  # what lies in front of the rows, and behind them, in memory order
    for n in x.shape[: x.row_dim]:
        before *= n
    for n in x.shape[x.row_dim + 1 :]:
        after *= n
    for dim, n in enumerate(size):
        if before and n >= before * x.rows.batch and n % (before * x.rows.batch) == 0:
            # The rows begin here. What is behind them may be split among this dimension and the following ones.
            inner = n // (before * x.rows.batch)
            if after % inner == 0:
                size[dim] = before * x.rows.count * inner
                return size, dim, before, inner
        if n == 0 or before % n:
            break
        before //= n
    raise NotRowwiseError(f"{size} splits the rows")
