"""
Which graphs have a tape.

A graph that is met for the second time is recorded: the engine runs inside the backward pass under way, and each op is
written down. The third time the engine and the tape both run, and are compared. From the fourth time on the tape runs
alone. e.g. a training with batches of one shape: step 2 records, step 3 compares, all others run from C++.

It is compared again after 16 runs, 32, 64, ...

When k, the number of kept rows, changes, the graph is recorded once more. If the recordings differ in sizes alone, and
these are multiples of k, the tape holds for any k, once it was compared with the engine for a third one (`counts.py`).
e.g. k = 13, 9, 11, 12, 10, ...: steps 2 and 3 record, step 4 compares.

The gradient that the graph gets is undefined, which costs autograd next to nothing: it walks through the nodes, frees
what they saved, and computes nothing. The nodes in front of the leaves hand out what the tape computed. So hooks of
leaves, DDP's among them, run as usual, and when they are due.
"""

import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from hf_trim.backward import waiting
from hf_trim.backward._torch_internals import current_dispatch_mode
from hf_trim.backward.compiled.comparison import tolerance
from hf_trim.backward.eager.rows import Rows
from hf_trim.backward.eager.tensor import RowSparseTensor
from hf_trim.backward.settings import current_settings
from hf_trim.backward.tape.counts import for_any_count
from hf_trim.backward.tape.extension import EXTENSION
from hf_trim.backward.tape.recorder import NoTapeError, Program, Recorder


logger = logging.getLogger(__name__)

TAPE_STEPS = 3  # backward passes of a graph before its tape runs alone
MOST_TAPES = 64  # texts of several lengths have one each
MOST_SEEN = 1024  # graphs that were met
MOST_MISSES = 4  # after which a tape is given up
# Two runs of the same ops differ by the order in which threads of a GPU add up: relative to all gradients.
_NOISE = 1e-6
_REFUSALS = (RuntimeError, TypeError, ValueError)  # of the library, which takes no such program


class _Tape:
    """
    What is known of a graph: its program, unless it has none, for which numbers of kept rows it holds, and for which
    it was compared with the engine.
    """

    def __init__(self, recorded: Program | None = None, program: Any = None, counts: frozenset[int] = frozenset()):
        self.recorded, self.program = recorded, program
        self.counts = counts  # the numbers of kept rows with which it was recorded; from two on it holds for all
        self.compared: set[int] = set()  # those with which it was compared
        self.runs = 0
        self.misses = 0  # how often in a row it did not hold for the numbers of a step

    def holds_for(self, count: int) -> bool:
        """Whether it can be run with this number of kept rows."""
        return len(self.counts) > 1 or count in self.counts

    def may_run_alone(self, count: int) -> bool:
        """Whether it has shown that it is right: with this number, or with one that is not recorded."""
        return count in self.compared or bool(self.compared - self.counts)

    def is_due(self) -> bool:
        """Whether it is compared again: after 16 runs, 32, 64, ... So what the key does not see comes out."""
        return self.runs >= 16 and self.runs & (self.runs - 1) == 0


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.complex64 if x.is_complex() else torch.float32)


def _metadata(grad: RowSparseTensor | None) -> tuple | None:
    """All of a gradient but its numbers, and how many rows are kept."""
    if grad is None:
        return None
    payload, layout = grad.payload, grad.layout_of_rows()[1:]
    return layout, grad.shape, grad.stride(), grad.dtype, grad.device, payload.is_conj(), payload.is_neg()


def _state_of_torch(device: torch.device) -> tuple:
    """What else decides which ops a formula of autograd runs."""
    kinds = {"cpu", device.type}
    autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds)]
    return *autocast, torch.are_deterministic_algorithms_enabled()


class Tapes:
    """The tapes of this process."""

    def __init__(self) -> None:
        self.counts: Counter = Counter()  # what was done: `"recorded"`, `"compared"`, `"ran"`, or why there is no tape
        self._seen: OrderedDict[int, None] = OrderedDict()
        self._tapes: OrderedDict[Any, _Tape] = OrderedDict()
        self._attempts = 0  # recordings, of graphs that have no tape too
        self._for_one_count: set = set()  # graphs that need a tape for each number of kept rows

    def run(
        self,
        node: Node,
        grads: tuple[RowSparseTensor | None, ...],
        rows: Rows,
        prepare: Callable[[], None],
    ) -> bool:
        """
        Run the backward pass under way from a tape, if there is one.

        Args:
            node (`torch.autograd.graph.Node`): The node that comes next.
            grads (`tuple[RowSparseTensor | None, ...]`): Its gradients.
            rows ([`~hf_trim.backward.eager.rows.Rows`]): The kept rows.
            prepare (`Callable`): Prepares the node, and what is behind it, for the engine.

        Returns:
            `bool`: Whether the leaves get their gradients, with undefined gradients for the node; if not, the engine
            has to run.
        """
        library = EXTENSION.get() if current_dispatch_mode() is None else None
        if library is None:
            return False
        inputs = [*(grad.payload for grad in grads if grad is not None), rows.index]
        graph = library.walk(node, inputs)
        if isinstance(graph, str):
            self.counts[graph] += 1
            return False
        # One row is in memory as no two are, and all rows are not sliced.
        sizes = rows.batch, rows.count in (1, rows.batch), rows.index.dtype, *map(_metadata, grads)
        # What the rule of a lookup knows of an index without reading it.
        ranges = tuple(i for i, x in enumerate(library.saved(graph)) if waiting.is_range(x))
        key: tuple = library.key(graph), sizes, ranges, _state_of_torch(rows.index.device)
        if key in self._for_one_count:
            key = *key, rows.count
        tape = self._tapes.get(key)
        if tape is None and not (self._was_seen(hash(key)) and self._may_record()):
            return False
        if tape is not None:
            self._tapes.move_to_end(key)
            if tape.program is None:
                return False
            if tape.may_run_alone(rows.count) and not tape.is_due():
                is_run = library.attach(tape.program, graph, inputs, rows.count)
                self._note(tape, "ran" if is_run else "")
                return is_run
        prepare()
        return self._learn(key, tape, library, graph, node, grads, inputs, rows.count)

    def _note(self, tape: _Tape, use: str) -> None:
        """Count the use of a tape, or that it does not hold for this step: tokens go to other experts, say."""
        self.counts[use or "other numbers"] += 1
        tape.runs += 1
        tape.misses = 0 if use else tape.misses + 1
        if tape.misses == MOST_MISSES:
            tape.program = None

    def _may_record(self) -> bool:
        """Whether recording pays: not where there are more graphs in turn than tapes, which would be recorded anew."""
        return self._attempts < MOST_TAPES + self.counts["ran"] // 4

    def _was_seen(self, number: int) -> bool:
        was_seen = number in self._seen
        self._seen[number] = None
        self._seen.move_to_end(number)
        if len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)
        return was_seen

    def _learn(self, key, tape, library, graph, node, grads, inputs, count: int) -> bool:
        """Run the engine inside this backward pass, to record a tape or to compare it."""
        leaves, saved = library.leaves(graph), library.saved(graph)
        settings = current_settings()
        num_fallbacks = settings.fallbacks.total()
        recorder = Recorder(inputs, saved) if tape is None or not tape.holds_for(count) else None
        taped = None
        try:
            if recorder is not None:
                self._attempts += 1
                with recorder:
                    gradients = self._engine(node, grads, leaves)
            else:
                gradients = self._engine(node, grads, leaves)
                taped = library.run(tape.program, graph, inputs, count)
        except Exception as error:  # too little memory, say, or `strict`: the engine will do the same, or manage
            self._keep(key, _Tape())
            self.counts[f"{type(error).__name__} in the {'comparison' if recorder is None else 'recording'}"] += 1
            return False
        if recorder is None:
            self._compare(tape, count, gradients, taped)
        else:
            ran_dense = settings.fallbacks.total() > num_fallbacks
            new = self._recorded(recorder, gradients, library, graph, count, ran_dense)
            if tape is None:
                self._keep(key, new)
            else:
                self._add(key, tape, new, count, library)
        # The gradients are there: a program without ops hands them out.
        results = [(-1 if x is None else i, 0) for i, x in enumerate(gradients)]
        library.attach(library.program([], len(leaves), len(leaves), 0, [], results), graph, gradients, count)
        return True

    @staticmethod
    def _engine(node: Node, grads: tuple, leaves: list[Node]) -> list[Tensor | None]:
        given = {i: grad for i, grad in enumerate(grads) if grad is not None}
        outputs = [GradientEdge(node, i) for i in given]
        inputs = [GradientEdge(leaf, 0) for leaf in leaves]  # of this graph: a leaf may have got another node since
        return list(torch.autograd.grad(outputs, inputs, [*given.values()], retain_graph=True, allow_unused=True))

    def _keep(self, key: Any, tape: _Tape) -> None:
        self._tapes[key] = tape
        if len(self._tapes) > MOST_TAPES:
            self._tapes.popitem(last=False)

    def _recorded(
        self, recorder: Recorder, gradients: list, library: Any, graph: Any, count: int, ran_dense: bool
    ) -> _Tape:
        try:
            if ran_dense:
                raise NoTapeError("an op ran dense")
            recorded = recorder.program(gradients, library.producers(graph))
            tape = _Tape(recorded, library.program(*recorded), frozenset([count]))
        except (NoTapeError, *_REFUSALS) as reason:
            self.counts[str(reason)] += 1
            return _Tape()
        self.counts["recorded"] += 1
        return tape

    def _add(self, key: tuple, known: _Tape, new: _Tape, count: int, library: Any) -> None:
        """Makes a tape for all numbers of kept rows of two; if there is none, each is for its own."""
        (known_count,) = known.counts
        if known.recorded is not None and new.recorded is not None:
            both = for_any_count(known.recorded, new.recorded, (known_count, count))
            with suppress(*_REFUSALS):
                if both is not None:
                    known.program, known.counts = library.program(*both), known.counts | {count}
                    known.recorded = None  # it is not needed any more
                    return
        self._for_one_count.add(key)
        self._keep((*key, known_count), self._tapes.pop(key))
        self._keep((*key, count), new)

    def _compare(self, tape: _Tape, count: int, engine: list, gradients: list | None) -> None:
        if gradients is None:
            self._note(tape, "")
            return
        norms = [0.0 if x is None else float(torch.linalg.vector_norm(_wide(x))) for x in engine]
        whole = math.hypot(*norms)
        if not math.isfinite(whole) or not whole:
            return  # nothing can be said
        allowed = tolerance(engine)
        for norm, a, b in zip(norms, engine, gradients, strict=True):
            if (a is None) != (b is None):
                error = math.inf
            else:
                error = 0.0 if a is None else float(torch.linalg.vector_norm(_wide(a) - _wide(b)))
            if not error <= max(allowed * norm, _NOISE * whole):
                tape.program = None
                self.counts["another gradient"] += 1
                logger.error(
                    f"A recorded backward pass differs from the row-sparse one by {error / whole:.1e} of the norm of "
                    "all gradients. It will not be used, and the gradients of this step are right. Please report this."
                )
                return
        tape.compared.add(count)
        self._note(tape, "compared")


TAPES = Tapes()
