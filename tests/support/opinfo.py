"""
Torch's own samples for each of its ops (OpInfo), and the gradients on the kept rows beside the dense ones, with rows
along every dimension of what the op returns: `python -m tests.support.opinfo`, or a part of it with `--ops mm fft.`.
`--compiled` makes a graph of each op, whose backward pass must be proved right or refused; no result is checked by
hf_trim itself.

e.g. `runs(op, torch.cdouble)` with the OpInfo of `mm`: each sample's product [n, p], with rows along n and along p.
"""

import argparse
import logging
import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from itertools import product
from signal import SIGTERM, default_int_handler, signal
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from hf_trim.backward.compiled.backend import keep_backward_graphs
from hf_trim.backward.eager.sparse import take_rows_sparse
from hf_trim.backward.settings import checked, fallback_report, reset_fallbacks


TOLERANCE = {torch.double: 1e-9, torch.cdouble: 1e-9}  # of what has no double precision: 1e-4
# What a run can end with. The dense gradients are the measure: where there are none, nothing is said.
EXACT, DENSE, WRONG, CRASH = "on the kept rows", "dense in part", "wrong", "crash"


class Run(NamedTuple):
    """What came of one choice of rows: the outcome, where it was, and the error or the ops that ran dense."""

    outcome: str
    where: str
    why: list[str]


def dtypes_of(op: OpInfo) -> list[torch.dtype]:
    """Real and complex dtypes in which an op has gradients, the most precise one of each kind."""
    has = op.supported_backward_dtypes("cpu") & op.supported_dtypes("cpu") if op.supports_autograd else set()
    kinds = (
        (torch.double, torch.float, torch.bfloat16, torch.half),
        (torch.cdouble, torch.cfloat, torch.complex32),
    )
    return [next(dtype for dtype in kind if dtype in has) for kind in kinds if has.intersection(kind)]


# ---- ways to call an op ------------------------------------------------------------------------------------------


def with_bit(x: Tensor) -> Tensor:
    """The same numbers, as a lazy conjugate or negative of transposed memory."""
    x = x.detach()
    if x.ndim > 1:
        x = x.mT.contiguous().mT
    x = x.conj().resolve_conj().conj() if x.is_complex() else torch._neg_view(-x)
    return x.requires_grad_()


def eager(op: OpInfo, arguments: tuple) -> Any:
    x, args, kwargs = arguments
    return op(x, *args, **kwargs)


@cache
def for_inductor() -> dict:
    """What inductor asks of AOTAutograd."""
    from torch._inductor.decomposition import select_decomp_table  # takes a second to import

    partition = partial(min_cut_rematerialization_partition, compiler="inductor")
    return {"decompositions": select_decomp_table(), "partition_fn": partition}


def compiled(op: OpInfo, arguments: tuple, decomposed: bool) -> Any:
    """The same by AOTAutograd's graphs for all sizes: of ATen's ops, or of those that inductor makes of them."""
    leaves, spec = tree_flatten(arguments)
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]

    def function(*tensors):
        changed = dict(zip(places, tensors, strict=True))
        return eager(op, tree_unflatten([changed.get(i, x) for i, x in enumerate(leaves)], spec))

    options = for_inductor() if decomposed else {}
    with keep_backward_graphs():
        return aot_function(function, boxed_nop, dynamic=True, **options)(*(leaves[i] for i in places))


Call = Callable[[OpInfo, tuple], Any]
EAGER: dict[str, tuple[Call, bool]] = {"": (eager, False), " with bits": (eager, True)}
COMPILED: dict[str, tuple[Call, bool]] = {
    ", for inductor": (partial(compiled, decomposed=True), False),
    ", aot_eager with bits": (partial(compiled, decomposed=False), True),
}

# ---- runs --------------------------------------------------------------------------------------------------------


def runs(
    op: OpInfo, dtype: torch.dtype, call: Call = eager, bits: bool = False, most: int | None = None
) -> Iterator[Run]:
    """
    Args:
        op (`OpInfo`): The op.
        dtype (`torch.dtype`): Of its samples.
        call (`Callable`, *optional*): How to call it; eagerly by default.
        bits (`bool`, *optional*, defaults to `False`): Whether the inputs are lazy conjugates or negatives.
        most (`int`, *optional*): How many samples to look at; all by default.

    Yields:
        `Run`: What came of each sample, with rows along each dimension.
    """
    samples = op.sample_inputs("cpu", dtype, requires_grad=True)
    for number, sample in enumerate(samples):
        if number == most:
            return
        torch.manual_seed(number)
        for run in runs_of_sample(op, sample, call, bits, random.Random(number)):
            yield run._replace(where=f"sample {number}, {run.where}")


def runs_of_sample(op: OpInfo, sample: SampleInput, call: Call, bits: bool, draw: random.Random) -> Iterator[Run]:
    arguments = (sample.input, sample.args, sample.kwargs)
    if bits:
        arguments = tree_map_only(
            Tensor, lambda x: with_bit(x) if x.requires_grad and x.layout == torch.strided else x, arguments
        )
    inputs = [x for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.requires_grad]
    try:
        out = sample.output_process_fn_grad(call(op, arguments))
    except Exception:  # samples of what an op does not support
        return
    for position, y in enumerate(tree_leaves(out)):
        if not isinstance(y, Tensor) or not y.requires_grad or y.layout != torch.strided or y.is_nested:
            continue
        for dim in range(y.ndim):
            if y.shape[dim] < 2 or not y.numel():
                continue
            kept = torch.tensor(sorted(draw.sample(range(y.shape[dim]), draw.randint(1, y.shape[dim] - 1))))
            where = f"output {position} {list(y.shape)}, rows {kept.tolist()} along {dim}"
            result = compare(y.movedim(dim, 0), inputs, kept)
            if result is not None:
                yield Run(result[0], where, result[1])


def compare(losses: Tensor, inputs: list[Tensor], kept: Tensor) -> tuple[str, list[str]] | None:
    """Both gradients of the kept losses; `None` if there are no dense ones."""
    cotangent = torch.randn_like(losses.detach()[kept])

    @functorch_config.patch(donated_buffer=False)  # or a graph runs once only
    def gradients(taken):
        return torch.autograd.grad(taken, inputs, cotangent, retain_graph=True, allow_unused=True)

    try:
        dense = gradients(losses.index_select(0, kept))
    except Exception:
        return None
    reset_fallbacks()
    try:
        with checked(False):  # the proof alone must know
            sparse = gradients(take_rows_sparse(losses, kept, 1.0))
        sparse = [x.densify() if hasattr(x, "densify") else x for x in sparse]
        difference = max(map(error, sparse, dense), default=0.0)
    except Exception as exception:
        return CRASH, [f"{type(exception).__name__}: {exception}"]
    fallbacks = list(fallback_report())
    if not difference < TOLERANCE.get(losses.dtype, 1e-4):
        return WRONG, [f"{difference:.1e}", *fallbacks]
    return (DENSE if fallbacks else EXACT), fallbacks


def error(sparse: Tensor | None, dense: Tensor | None) -> float:
    """The largest difference, relative to the dense gradient's norm (to 1 if it is smaller)."""
    if sparse is None or dense is None:
        return float("inf") if sparse is not dense else 0.0
    if sparse.shape != dense.shape or sparse.dtype != dense.dtype or sparse.layout != dense.layout:
        return float("inf")
    sparse, dense = (x.to_dense() if x.layout != torch.strided else x for x in (sparse, dense))
    # Zero times infinity is NaN in the dense pass, and zero on the kept rows: see `rules/__init__.py`.
    finite = dense.isfinite()
    sparse, dense = (x.where(finite, 0).to(torch.cdouble) for x in (sparse, dense))
    return float((sparse - dense).norm() / dense.norm().clamp(min=1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ops", nargs="+", default=[""], help="parts of names of ops")
    parser.add_argument("--shard", default="0/1", help="e.g. 0/2 and 1/2, in two processes")
    parser.add_argument("--start", type=int, default=0, help="the op to go on with, by its number in a verbose run")
    parser.add_argument("--most", type=int, help="samples of an op")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()  # reasons are counted
    shard, shards = map(int, args.shard.split("/"))
    ops = [op for op in op_db if any(part in op.formatted_name for part in args.ops)][shard::shards]
    signal(SIGTERM, default_int_handler)  # a run that is ended says what it counted
    calls = (COMPILED if args.compiled else EAGER).items()
    counts: dict = defaultdict(Counter)
    reasons: Counter = Counter()
    with patch("hf_trim.backward.eager.saved.MIN_ELEMENTS", 0), suppress(KeyboardInterrupt):
        for number, op in list(enumerate(ops))[args.start :]:
            if args.verbose:
                print(f"{number} of {len(ops)}: {op.formatted_name}", flush=True)
            for dtype, (name, (call, bits)) in product(dtypes_of(op), calls):
                faults = []
                for run in runs(op, dtype, call, bits, args.most):
                    counts[f"{dtype}{name}"][run.outcome] += 1
                    if run.outcome == DENSE:
                        reasons.update(run.why)
                    elif run.outcome != EXACT:
                        faults.append(run)
                if faults:
                    print(
                        f"{len(faults)} faults: {op.formatted_name}, {dtype}{name}, e.g. {faults[0]}"[:400], flush=True
                    )
    for kind, count in counts.items():
        print(f"{kind}: {count.total()} runs, {dict(count)}")
    if args.verbose:
        print("dense:", *(f"{count} {reason}" for reason, count in reasons.most_common(100)), sep="\n")


if __name__ == "__main__":
    main()
