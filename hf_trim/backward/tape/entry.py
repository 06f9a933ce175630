"""
Where a tape begins: the first node behind the losses through which all their gradients go.

e.g. a span of text has a loss for its start and one for its end. Both come from `[B, T, 2]` scores, whose two columns
are split. The engine runs the few nodes up to the split, and the tape all that comes behind them. With one loss, the
tape begins at its own node.
"""

import heapq
from collections.abc import Callable, Iterable

from torch.autograd.graph import Node

from hf_trim.backward._torch_internals import sequence_number


_MOST_BEFORE = 64  # nodes that the engine runs at most, before all gradients have met


def find_entry(nodes: Iterable[Node], may_begin: Callable[[Node], bool]) -> Node | None:
    """
    Args:
        nodes (iterable of `torch.autograd.graph.Node`): Where the backward pass begins.
        may_begin (`Callable`): Whether a tape may begin at a node.

    Returns:
        `torch.autograd.graph.Node` or `None`: The node, if there is one near by. Gradients of the others get to leaves
        and to this node only.
    """
    # Later nodes of the forward pass come first. (Where they do not, all that is behind a node has come before it.)
    queue = [(-sequence_number(node), id(node), node) for node in nodes]
    heapq.heapify(queue)
    seen = {node for *_, node in queue}
    for _ in range(_MOST_BEFORE):
        if not queue:
            return None
        *_, node = heapq.heappop(queue)
        if not queue and may_begin(node):
            return node
        for next_node, _ in node.next_functions:
            if next_node is not None and next_node not in seen and type(next_node).__name__ != "AccumulateGrad":
                seen.add(next_node)
                heapq.heappush(queue, (-sequence_number(next_node), id(next_node), next_node))
    return None
