"""
Ops that see the whole batch in a graph that runs on the kept rows.

A kernel of attention with dropout draws the mask of a sample by its place in the batch. For the kept rows alone it
would draw others than in the forward pass. Such an op is met when the compiled code calls it: the rows of its operands
go back to their places, with zeros in the others, and of its results the kept rows are taken.

Example: samples 1 and 3 of B = 4 are kept. The graph calls `_scaled_dot_product_flash_attention_backward` with tensors
`[2, H, T, D]`. The kernel gets `[4, H, T, D]`, where rows 0 and 2 are zero, and what the graph gets is rows 1 and 3 of
the result, with the strides that a result for two samples has.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_trim.backward._torch_internals import OpOverload, TorchDispatchMode, tree_map_only
from hf_trim.backward.eager.tensor import Rows, RowSparseTensor
from hf_trim.backward.facts.fact import Fact


class OnWholeBatch(TorchDispatchMode):
    """
    A context in which ops run on the whole batch, called with the kept rows.

    Args:
        facts (`dict[OpOverload, Fact]`): The ops. All operands and results that carry rows have them in dimension 0.
        rows ([`~hf_trim.backward.eager.rows.Rows`]): The kept rows.
        count (`int`): Number of rows that the graph runs on: the kept ones, and copies of the last one behind them.
    """

    def __init__(self, facts: Mapping[OpOverload, Fact], rows: Rows, count: int):
        super().__init__()
        self.facts, self.count = facts, count
        self.rows = Rows(rows.index, rows.batch, may_be_run=False)
        self.calls: Counter[OpOverload] = Counter()  # how often each of the ops was met

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        fact, kwargs = self.facts.get(func), kwargs or {}
        if fact is None or not (fact.needs_batch and fact.needs_batch(*args, **kwargs)):
            return func(*args, **kwargs)
        self.calls[func] += 1
        size, of_rows = len(args[fact.rows[0]]), {*fact.rows, *fact.shared}
        # Operands that are broadcast over the rows have another size.
        whole = [
            self._at_their_places(x) if i in of_rows and isinstance(x, Tensor) and len(x) == size else x
            for i, x in enumerate(args)
        ]
        return tree_map_only(Tensor, self._kept, func(*whole, **kwargs))

    def _at_their_places(self, x: Tensor) -> Tensor:
        inner = len(x) // self.count
        return RowSparseTensor(x.narrow(0, 0, self.rows.count * inner), self.rows, row_inner=inner).with_zeros()

    def _kept(self, x: Tensor) -> Tensor:
        """The kept rows of a result, with zeros behind them: rows that are padded have a gradient of zero."""
        inner = len(x) // self.rows.batch
        size, step = self.count * inner, x.stride(0)
        strides = [stride * size // len(x) if stride > step else stride for stride in x.stride()]
        out = torch.empty_strided((size, *x.shape[1:]), strides, dtype=x.dtype, device=x.device)
        kept = self.rows.count * inner
        torch.index_select(x, 0, self.rows.entries(inner, x.device), out=out.narrow(0, 0, kept))
        out.narrow(0, kept, size - kept).zero_()
        return out


def num_calls(graph: torch.fx.Graph, facts: Mapping[OpOverload, Fact]) -> dict[OpOverload, int]:
    """How often a graph calls ops that need the whole batch."""
    calls: Counter[Any] = Counter()
    for node in graph.nodes:
        fact = facts.get(node.target)
        if fact is not None and fact.needs_batch and fact.needs_batch(*node.args, **node.kwargs):
            calls[node.target] += 1
    return calls
