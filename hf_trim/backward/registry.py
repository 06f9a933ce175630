"""
Op → rule, in three tables filled by one decorator.

| table | a rule says | called by |
|---|---|---|
| `GRADIENTS` | what an op returns for row-sparse gradients | `eager/tensor.py`, in the backward pass |
| `ACTIVATIONS` | what an op returns for activations known in the kept rows only | the same, under checkpointing |
| `PROOF` | which dimension of an op's result carries the rows | `compiled/proof.py`, once for a compiled graph |

```python
@implements("mm", "bmm")  # GRADIENTS is the default table
def matmul(func, a, b): ...
```
"""

from collections.abc import Callable
from typing import Any

import torch


class RuleTable(dict):
    """
    Op → rule. Looking up an op that has no rule of its own asks `default`, and remembers the answer.

    Args:
        name (`str`): What the rules are about, for messages.
        by_name (`bool`, *optional*, defaults to `False`): Whether keys are names of ops, with all their overloads and
            in all namespaces (`"sum"`), rather than overloads (`torch.ops.aten.sum.dim_IntList`).
    """

    def __init__(self, name: str, by_name: bool = False):
        super().__init__()
        self.name, self.by_name = name, by_name
        self.registered: set = set()  # keys with a rule of their own
        self.default: Callable[[Any], Callable | None] = lambda op: None

    def __missing__(self, op):
        rule = self[op] = self.default(op)
        return rule

    def register(self, key, function: Callable) -> None:
        """
        Args:
            key (`str` or `torch._ops.OpOverload`): The op.
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


def overloads(*ops) -> list:
    """
    Finds ops by name.

    Args:
        ops (`str` or `torch._ops.OpOverload`):
            Overloads, or names such as `"mm"` (the default overload) and `"add.Tensor"` of ATen ops.

    Returns:
        `list[torch._ops.OpOverload]`: Those that this version of PyTorch has.
    """
    resolved = []
    for op in ops:
        if isinstance(op, str):
            name, _, overload = op.partition(".")
            op = getattr(getattr(torch.ops.aten, name, None), overload or "default", None)
        if op is not None:
            resolved.append(op)
    return resolved


def implements(*ops, table: RuleTable | tuple[RuleTable, ...] = GRADIENTS) -> Callable[[Callable], Callable]:
    """
    Registers a function as the rule of some ops.

    Args:
        ops (`str` or `torch._ops.OpOverload`): As for [`overloads`]; in a table by name, names alone.
        table ([`RuleTable`] or a tuple of them, *optional*): Where to; `GRADIENTS` by default.

    Returns:
        `Callable`: The decorator. It hands the function back as it is.

    Raises:
        `ValueError`: If an op has a rule there already.
    """

    def register(function: Callable) -> Callable:
        for each in table if isinstance(table, tuple) else (table,):
            for key in ops if each.by_name else overloads(*ops):
                each.register(key, function)
        return function

    return register
