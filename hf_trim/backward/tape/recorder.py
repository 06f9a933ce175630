"""
The ops that a backward pass runs → a program for `tape.cpp`.

What an op reads is the result of an earlier op, an input of the tape (the gradient, the numbers of the kept rows), or
what the graph saved. Anything else might differ in the next step, and there is no tape. Nor is there one where numbers
are drawn at random.

Where the host reads a number, or the shape of a result depends on one, the tape holds for that number alone. The ops
that lead to it come first in the program, which ends there if another number comes out; the engine then runs. These
ops must not need the gradient. What is computed from constants alone is the same each time.

e.g. `index_select(x, 0, rows)`, `t(grad)`, `mm(…)` of a linear layer: `grad` and `rows` are the inputs, registers 0
and 1, and `x` is saved tensor 0, register 2. The results get registers 3 to 5; the last one is the gradient of leaf 0.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_trim.backward._torch_internals import (
    OpOverload,
    StorageWeakRef,
    TorchDispatchMode,
    current_node,
    is_mutable,
    op_arguments,
    return_types,
    sequence_number,
    tree_iter,
)
from hf_trim.backward.eager.tensor import RowTensor


aten = torch.ops.aten
_IDENTITIES = {aten.detach.default, aten.alias.default}  # below autograd
_NUMBERS = (bool, int, float, complex)


class NoTapeError(Exception):
    """Why a backward pass cannot be recorded."""


class Program(NamedTuple):
    """
    What `tape.cpp` makes a program of.

    Args:
        ops (`list[tuple]`): For each op its name and overload, `arguments` as in [`Op`], the registers of its results
            (−1 where nobody needs them), registers that are not needed any more, and what is `expected` as in [`Op`].
        num_registers (`int`): Number of registers.
        num_inputs (`int`): Number of inputs, which are in the first registers.
        num_first (`int`): Number of ops that lead to numbers which must be the same.
        saved (`list[tuple]`): Numbers of saved tensors, and their registers.
        results (`list[tuple]`): For each leaf the register of its gradient, −1 for none, and after how many ops it is
            there.
    """

    ops: list[tuple]
    num_registers: int
    num_inputs: int
    num_first: int
    saved: list[tuple[int, int]]
    results: list[tuple[int, int]]


class Op(NamedTuple):
    """
    One op of the tape.

    Args:
        func (`OpOverload`): The op.
        arguments (`tuple`): For each argument of its schema `("register", n)`, `("registers", [n, ...])` with −1 for
            `None`, `("constant", value)`, or `("default",)`.
        results (`tuple`): For each result the registers of its tensors, −1 where there is none.
        age (`float`, *optional*): Number of the node that was running. Autograd runs those with high numbers first.
        expected (`list`, *optional*): For each result the number that it must be, or the sizes of its tensors.
    """

    func: OpOverload
    arguments: tuple
    results: tuple
    age: float = math.inf
    expected: list | None = None

    def reads(self) -> set[int]:
        """The registers that it reads."""
        single = {x[1] for x in self.arguments if x[0] == "register"}
        return single | {n for x in self.arguments if x[0] == "registers" for n in x[1] if n >= 0}

    def writes(self) -> set[int]:
        """The registers that it sets."""
        return {n for result in self.results for n in result if n >= 0}


def _names(func: OpOverload) -> tuple[str, str]:
    """The name of an op and that of its overload, e.g. `("aten::sum", "dim_IntList")`."""
    name, _, overload = func.name().partition(".")
    return name, overload


def _storage(x: Tensor) -> int:
    """The same number for all tensors that share their memory, while one of them is there."""
    return StorageWeakRef(x.untyped_storage()).cdata


def _has_dynamic_shape(func: OpOverload, args: tuple) -> bool:
    """Whether the shape of a result depends on numbers in the operands. Of lookups this is so with masks only."""
    if func is aten.index.Tensor and all(i is None or i.dtype in (torch.long, torch.int) for i in args[1]):
        return False
    return torch.Tag.dynamic_output_shape in func.tags


def _place(x: Tensor) -> tuple:
    """Where a tensor is in memory, and how it is read from there."""
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, x.is_conj(), x.is_neg()


class Recorder(TorchDispatchMode):
    """
    Within this context, ops on ordinary tensors are recorded, those inside the rules of row-sparse tensors too.

    Args:
        inputs (`Sequence[torch.Tensor]`): What the tape is given: gradients, and at last the numbers of the kept rows.
        saved (`Sequence[torch.Tensor]`): What the graph saved.
    """

    def __init__(self, inputs: Sequence[Tensor], saved: Sequence[Tensor]):
        super().__init__()
        self.refusal = ""
        self._ops: list[Op] = []
        self._alive: list[Tensor] = [*saved]  # so that no other tensor gets the `id` of one of them, or its memory
        self._registers: dict[int, int] = {}  # `id` of a tensor → its register
        self._storages: list[int] = []  # of each register
        self._foreign = {_storage(x) for x in (*inputs, *saved)}  # memory that is not the tape's
        self._varying = set(self._foreign)  # memory whose content is not the same in all steps
        self._num_inputs = len(inputs)
        for x in inputs:
            self._add_register(x)
        self._saved = {_place(x): number for number, x in reversed(list(enumerate(saved)))}
        self._used: dict[int, int] = {}  # number of a saved tensor → its register

    # ---- while the backward pass runs -----------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(issubclass(kind, RowTensor) for kind in types):
            return NotImplemented  # the ops inside its rule come back here
        if self.refusal or func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        arguments = self._unless_refused(func, self._arguments, args, kwargs)
        out = func(*args, **kwargs)
        if not self.refusal:
            self._unless_refused(func, self._add, arguments, _has_dynamic_shape(func, args), out)
        return out

    def _unless_refused(self, func: OpOverload, step: Callable[..., Any], *args: Any) -> Any:
        try:
            return step(func, *args)
        except NoTapeError as reason:
            self.refusal = f"{func}: {reason}"
            return None

    def _arguments(self, func: OpOverload, args: tuple, kwargs: dict) -> tuple:
        if func.namespace != "aten" or torch.Tag.nondeterministic_seeded in func.tags:
            raise NoTapeError("it may do something else in the next step")
        out = []
        for i, (name, is_written) in enumerate(op_arguments(func)):
            if i >= len(args) and name not in kwargs:
                out.append(("default",))
                continue
            value = args[i] if i < len(args) else kwargs[name]
            # A tensor that was made of a number comes here as that number.
            if is_written and not all(isinstance(x, Tensor) and self._is_own(x) for x in tree_iter(value)):
                raise NoTapeError("it changes a tensor that is not the tape's")
            out.append(self._argument(value))
        return tuple(out)

    def _is_own(self, x: Tensor) -> bool:
        return _storage(x) not in self._foreign

    def _argument(self, value: Any) -> tuple:
        if isinstance(value, Tensor):
            return "register", self._register(value)
        if isinstance(value, (list, tuple)) and any(isinstance(x, Tensor) for x in value):
            return "registers", [-1 if x is None else self._register(x) for x in value]
        if isinstance(value, torch.Generator):
            raise NoTapeError("it draws random numbers")
        return "constant", value

    def _register(self, x: Tensor) -> int:
        if id(x) not in self._registers:
            number = self._saved.get(_place(x)) if type(x) in (Tensor, torch.nn.Parameter) else None
            if number is None:
                raise NoTapeError(f"it reads a tensor {list(x.shape)} that the graph did not save")
            if number in self._used:
                self._alive.append(x)
                self._registers[id(x)] = self._used[number]
            else:
                self._used[number] = self._add_register(x)
        return self._registers[id(x)]

    def _add_register(self, x: Tensor) -> int:
        self._alive.append(x)
        self._registers[id(x)] = len(self._storages)
        self._storages.append(_storage(x))
        return self._registers[id(x)]

    def _add(self, func: OpOverload, arguments: tuple, is_dynamic: bool, out: Any) -> None:
        if func in _IDENTITIES:
            self._alive.append(out)
            self._registers[id(out)] = arguments[0][1]
            return
        values = [out] if len(return_types(func)) == 1 else list(out or ())
        lists = [value if isinstance(value, (list, tuple)) else [value] for value in values]
        if not all(x is None or isinstance(x, (Tensor, *_NUMBERS)) for x in tree_iter(lists)):
            raise NoTapeError("it returns neither tensors nor numbers")
        results = [[self._result(x) if isinstance(x, Tensor) else -1 for x in tensors] for tensors in lists]
        node = current_node()
        op = Op(func, arguments, tuple(results), age=math.inf if node is None else sequence_number(node))
        if not self._written(func, arguments) <= op.writes():
            raise NoTapeError("it changes a tensor that it does not return")
        if any(self._storages[n] in self._varying for n in op.reads()):
            self._varying |= {self._storages[n] for n in op.writes()}
            if is_dynamic:
                op = op._replace(expected=[[tuple(x.shape) for x in tensors] for tensors in lists])
            elif any(isinstance(x, _NUMBERS) for x in values):
                op = op._replace(expected=values)
        self._ops.append(op)

    @staticmethod
    def _written(func: OpOverload, arguments: tuple) -> set[int]:
        written = [x for x, (_, is_written) in zip(arguments, op_arguments(func), strict=True) if is_written]
        return set(Op(func, tuple(written), ()).reads())

    def _result(self, x: Tensor) -> int:
        if type(x) is not Tensor:
            raise NoTapeError("it returns no ordinary tensor")
        known = self._registers.get(id(x))  # an op in place returns its argument
        return self._add_register(x) if known is None else known

    # ---- afterwards -----------------------------------------------------------------------------------------------

    def program(self, gradients: Sequence[Tensor | None], producers: Sequence[int]) -> Program:
        """
        Args:
            gradients (`Sequence[torch.Tensor | None]`): What the recorded backward pass returned for each leaf.
            producers (`Sequence[int]`): For each leaf the number of the node that hands it out.

        Returns:
            [`Program`]: What computes them.

        Raises:
            [`NoTapeError`]: If there is none.
        """
        if self.refusal:
            raise NoTapeError(self.refusal)
        wanted = [-1 if grad is None else self._register(grad) for grad in gradients]
        ops, num_first = self._with_numbers_first(self._live(wanted))
        ops, wanted = self._with_memory_of_their_own(ops, wanted)
        needed, last_use = set(wanted).union(*(op.reads() for op in ops)), {}
        for i, op in enumerate(ops):
            last_use.update(dict.fromkeys(op.reads() | op.writes(), i))
        frees: list[list[int]] = [[] for _ in ops]
        for n, i in last_use.items():
            if n not in wanted:
                frees[i].append(n)
        described = [
            (
                *_names(op.func),
                op.arguments,
                tuple([n if n in needed else -1 for n in result] for result in op.results),
                tuple(sorted(freed)),
                op.expected,
            )
            for op, freed in zip(ops, frees, strict=True)
        ]
        saved = [(number, n) for number, n in self._used.items() if n in needed]
        # A result is there when the last copy of it was made. And its owner may change the weight at once, as an
        # optimizer inside the backward pass does: what this node and those before it make of the weight comes first.
        used = {self._storages[n]: i for i, op in enumerate(ops) for n in op.reads() | op.writes()}
        before = [max((i for i, op in enumerate(ops) if op.age >= age), default=-1) for age in producers]
        ends = (1 + max(used.get(self._storages[n], -1), i) for n, i in zip(wanted, before, strict=True))
        results = [(n, end if n >= 0 else 0) for n, end in zip(wanted, ends, strict=True)]
        return Program(described, len(self._storages), self._num_inputs, num_first, saved, results)

    def _live(self, wanted: list[int]) -> list[Op]:
        """The ops that somebody needs. What is written in place may be read through a view."""
        needed, live = set(wanted), []
        for op in reversed(self._ops):
            if is_mutable(op.func) or op.expected is not None or op.writes() & needed:
                live.append(op)
                needed |= op.reads()
        return live[::-1]

    def _with_numbers_first(self, ops: list[Op]) -> tuple[list[Op], int]:
        """The ops that lead to numbers which the host read, then the others; and how many the first are."""
        first: set[int] = set()
        registers: set[int] = set()  # that the first ops read
        memory: set[int] = set()  # of these: what is written to it later belongs to them, too
        num_first = -1
        while num_first < len(first):
            num_first = len(first)
            for i, op in reversed(list(enumerate(ops))):
                written = {self._storages[n] for n in op.writes()} - self._foreign
                if op.expected is not None or op.writes() & registers or written & memory:
                    first.add(i)
                    registers |= op.reads()
                    memory |= written | {self._storages[n] for n in op.reads()} - self._foreign
        gradients = set(range(self._num_inputs - 1))
        for i, op in enumerate(ops):
            if i in first and op.reads() & gradients:
                raise NoTapeError(f"{op.func}: a number depends on the gradient")
            # An op that stays behind must find what it found: nothing is written after it.
            late = {self._storages[n] for j in first if j > i and is_mutable(ops[j].func) for n in ops[j].writes()}
            if i not in first and late & {self._storages[n] for n in op.reads()}:
                raise NoTapeError(f"{op.func}: it reads what is written to later")
        return [ops[i] for i in sorted(first)] + [op for i, op in enumerate(ops) if i not in first], len(first)

    def _with_memory_of_their_own(self, ops: list[Op], wanted: list[int]) -> tuple[list[Op], list[int]]:
        """
        Leaves keep what they are given, and change it. Where that is not theirs alone, they get a copy: it belongs to
        the graph, to another leaf, or is read by a later op.
        """
        changed = {self._storages[n]: i for i, op in enumerate(ops) for n in op.writes()}
        last_read = {self._storages[n]: i for i, op in enumerate(ops) for n in op.reads()}
        taken, own = set(self._foreign), []
        copies: dict[int, list[Op]] = {}  # behind which op → copies
        for n in wanted:
            storage = self._storages[n] if n >= 0 else -1
            end = changed.get(storage, -1)
            if n >= 0 and (storage in taken or last_read.get(storage, -1) > end):
                self._storages.append(-len(self._storages) - 2)  # memory that there is not yet
                n, source = len(self._storages) - 1, n
                copy = Op(aten.clone.default, (("register", source), ("default",)), ([n],), age=-math.inf)
                copies.setdefault(end, []).append(copy)
            taken.add(storage)
            own.append(n)
        out = list(copies.get(-1, ()))
        for i, op in enumerate(ops):
            out += [op, *copies.get(i, ())]
        return out, own
