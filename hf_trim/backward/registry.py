"""
Op → rule, in three tables filled by one decorator.

| table | a rule says | called by |
|---|---|---|
| `GRADIENTS` | what an op returns for row-sparse gradients | `eager/tensor.py`, in the backward pass |
| `ACTIVATIONS` | what an op returns for activations known in the kept rows only | `eager/activation.py`, there too |
| `PROOF` | which dimension of an op's result carries the rows | `compiled/proof.py`, once for a compiled graph |

To add a rule: name the op, write what it returns, compare with dense autograd. What a rule must guarantee is in
`eager/rules/__init__.py`. e.g. `grad` and `x` are `[B, C]`, B = 4, rows 1 and 3 kept: `grad.payload` is `[2, C]`, and
`grad.kept_rows(x)` are the same two rows of `x`.

```python
import torch
from torch.nn.functional import soft_margin_loss

from hf_trim.backward import implements, strict, take_rows_sparse
from hf_trim.backward.registry import require


@implements("soft_margin_loss_backward")  # an op of ATen; GRADIENTS is the default table
def soft_margin_loss_backward(func, grad, x, target, reduction):
    require(reduction == 0, "the loss is reduced")  # or the op runs dense
    return grad.like(func(grad.payload, grad.kept_rows(x), grad.kept_rows(target), reduction))


def test_soft_margin_loss():
    x, target, kept = torch.randn(4, 3, requires_grad=True), torch.ones(4, 3), torch.tensor([1, 3])
    losses = soft_margin_loss(x, target, reduction="none").sum(1)
    with strict():  # raises where an op has no rule
        (sparse,) = torch.autograd.grad(take_rows_sparse(losses, kept).sum(), x, retain_graph=True)
    torch.testing.assert_close(sparse, torch.autograd.grad(losses[kept].sum(), x)[0])
```
"""

from collections.abc import Callable
from typing import Any

import torch

from hf_trim.backward._torch_internals import OpOverload


class NotRowwiseError(Exception):
    """
    A rule does not apply to these operands, since their rows may be mixed: the op runs dense instead, or a compiled
    graph on the whole batch. The message says why.
    """


def require(condition: bool, reason: str) -> None:
    """Ends a rule that does not apply to its operands."""
    if not condition:
        raise NotRowwiseError(reason)


class RuleTable(dict):
    """
    Op → rule. An op without a rule of its own gets what `default` says, which is asked once.

    Args:
        name (`str`): What the rules are about, for messages.
        by_name (`bool`, *optional*, defaults to `False`): Whether keys are names of ops, with all their overloads and
            in all namespaces (`"sum"`), rather than overloads (`torch.ops.aten.sum.dim_IntList`).
    """

    def __init__(self, name: str, by_name: bool = False) -> None:
        super().__init__()
        self.name, self.by_name = name, by_name
        self.registered: set = set()  # ops with a rule of their own; all other rules came from `default`
        self.default: Callable[[Any], Callable | None] = lambda op: None

    def __missing__(self, op: Any) -> Callable | None:
        rule = self[op] = self.default(op)
        return rule

    def register(self, key: str | OpOverload, function: Callable) -> None:
        """
        Args:
            key (`str` or `OpOverload`): The op.
            function (`Callable`): Its rule.

        Raises:
            `ValueError`: If the op has a rule already.
        """
        if key in self.registered:
            raise ValueError(f"{key} has a rule in the table of {self.name} already: {self[key].__qualname__}.")
        self.registered.add(key)
        self[key] = function


GRADIENTS = RuleTable("gradients")
ACTIVATIONS = RuleTable("activations")
PROOF = RuleTable("the proof", by_name=True)


def overloads(*ops: str | OpOverload) -> list[OpOverload]:
    """
    Finds ops by name.

    Args:
        ops (`str` or `OpOverload`):
            Overloads, or names such as `"mm"` (the default overload) and `"add.Tensor"` of ATen ops.

    Returns:
        `list[OpOverload]`: Those that this version of PyTorch has.
    """
    return [op for op in map(_find_overload, ops) if op is not None]


def _find_overload(op: str | OpOverload) -> OpOverload | None:
    if not isinstance(op, str):
        return op
    name, _, overload = op.partition(".")
    return getattr(getattr(torch.ops.aten, name, None), overload or "default", None)


def implements(
    *ops: str | OpOverload, table: RuleTable | tuple[RuleTable, ...] = GRADIENTS
) -> Callable[[Callable], Callable]:
    """
    Registers a function as the rule of some ops.

    Args:
        ops (`str` or `OpOverload`): As for [`overloads`]; in a table by name, names alone.
        table ([`RuleTable`] or a tuple of them, *optional*): Where to; `GRADIENTS` by default.

    Returns:
        `Callable`: The decorator. It hands the function back as it is.

    Raises:
        `ValueError`: If an op has a rule there already.
    """

    def register(function: Callable) -> Callable:
        for rules in table if isinstance(table, tuple) else (table,):
            for key in ops if rules.by_name else overloads(*ops):
                rules.register(key, function)
        return function

    return register
