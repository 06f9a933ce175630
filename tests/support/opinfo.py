"""
Torch's own samples for each of its ops (OpInfo), and the gradients on the kept rows beside the dense ones, with rows
along every dimension of what the op returns: `python -m tests.support.opinfo`, or a part of it with `--ops mm fft.`.

e.g. `runs(op, torch.cdouble)` with the OpInfo of `mm`: each sample's product [n, p], with rows along n and along p.
"""

import argparse
import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils._pytree import tree_leaves, tree_map_only

from hf_trim.backward.eager.sparse import take_rows_sparse
from hf_trim.backward.settings import fallback_report, reset_fallbacks


TOLERANCE = {torch.double: 1e-9, torch.cdouble: 1e-9}  # of what has no double precision: 1e-4
# What a run can end with. The dense gradients are the measure: where there are none, nothing is said.
EXACT, DENSE, WRONG, CRASH = "on the kept rows", "dense in part", "wrong", "crash"


def dtypes_of(op: OpInfo) -> list[torch.dtype]:
    """Real and complex dtypes in which an op has gradients, the most precise one of each kind."""
    has = op.supported_backward_dtypes("cpu") & op.supported_dtypes("cpu") if op.supports_autograd else set()
    kinds = (
        (torch.double, torch.float, torch.bfloat16, torch.half),
        (torch.cdouble, torch.cfloat, torch.complex32),
    )
    return [next(dtype for dtype in kind if dtype in has) for kind in kinds if has.intersection(kind)]


def with_bit(x: Tensor) -> Tensor:
    """The same numbers, as a lazy conjugate or negative."""
    x = x.detach()
    x = x.conj().resolve_conj().conj() if x.is_complex() else torch._neg_view(-x)
    return x.requires_grad_()


def runs(op: OpInfo, dtype: torch.dtype, bits: bool = False, most: int | None = None) -> Iterator[tuple]:
    """
    Args:
        op (`OpInfo`): The op.
        dtype (`torch.dtype`): Of its samples.
        bits (`bool`, *optional*, defaults to `False`): Whether the inputs are lazy conjugates or negatives.
        most (`int`, *optional*): How many samples to look at; all by default.

    Yields:
        `tuple`: What each run ended with, and what there is to say about it.
    """
    samples = op.sample_inputs("cpu", dtype, requires_grad=True)
    for number, sample in enumerate(samples):
        if number == most:
            return
        torch.manual_seed(number)
        for outcome, about in runs_of_sample(op, sample, bits, random.Random(number)):
            yield outcome, f"sample {number}, {about}"


def runs_of_sample(op: OpInfo, sample: SampleInput, bits: bool, draw: random.Random) -> Iterator[tuple]:
    arguments = (sample.input, sample.args, sample.kwargs)
    if bits:
        arguments = tree_map_only(
            Tensor, lambda x: with_bit(x) if x.requires_grad and x.layout == torch.strided else x, arguments
        )
    inputs = [x for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.requires_grad]
    try:
        x, args, kwargs = arguments
        out = sample.output_process_fn_grad(op(x, *args, **kwargs))
    except Exception:  # samples of what an op does not support
        return
    for position, y in enumerate(tree_leaves(out)):
        if not isinstance(y, Tensor) or not y.requires_grad or y.layout != torch.strided or y.is_nested:
            continue
        for dim in range(y.ndim):
            if y.shape[dim] < 2 or not y.numel():
                continue
            kept = torch.tensor(sorted(draw.sample(range(y.shape[dim]), draw.randint(1, y.shape[dim] - 1))))
            about = f"output {position} {list(y.shape)}, rows {kept.tolist()} along {dim}"
            result = compare(y.movedim(dim, 0), inputs, kept)
            if result is not None:
                yield result[0], f"{about}: {result[1]}"


def compare(losses: Tensor, inputs: list[Tensor], kept: Tensor) -> tuple[str, str] | None:
    """Both gradients of the kept losses; `None` if there are no dense ones."""
    cotangent = torch.randn_like(losses.detach()[kept])

    def gradients(taken):
        return torch.autograd.grad(taken, inputs, cotangent, retain_graph=True, allow_unused=True)

    try:
        dense = gradients(losses.index_select(0, kept))
    except Exception:
        return None
    reset_fallbacks()
    try:
        sparse = [x.densify() if hasattr(x, "densify") else x for x in gradients(take_rows_sparse(losses, kept, 1.0))]
        difference = max(map(error, sparse, dense), default=0.0)
    except Exception as exception:
        return CRASH, f"{type(exception).__name__}: {exception}"
    if not difference < TOLERANCE.get(losses.dtype, 1e-4):
        return WRONG, f"{difference:.1e} {fallback_report() or ''}"
    fallbacks = fallback_report()
    return (DENSE, ", ".join(fallbacks)) if fallbacks else (EXACT, "")


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
    parser.add_argument("--most", type=int, help="samples of an op")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    shard, shards = map(int, args.shard.split("/"))
    ops = [op for op in op_db if any(part in op.formatted_name for part in args.ops)][shard::shards]
    counts: dict = defaultdict(Counter)
    faults: dict = defaultdict(list)
    dense_ops: Counter = Counter()
    with patch("hf_trim.backward.eager.saved.MIN_ELEMENTS", 0):
        for op in ops:
            for dtype in dtypes_of(op):
                for bits in (False, True):
                    kind = f"{dtype}{' with bits' * bits}"
                    for outcome, about in runs(op, dtype, bits, args.most):
                        counts[kind][outcome] += 1
                        if outcome in (WRONG, CRASH):
                            faults[op.formatted_name, kind, outcome].append(about)
                        elif outcome == DENSE:
                            dense_ops.update(about.rpartition(": ")[2].split(", "))
    for (name, kind, outcome), abouts in faults.items():
        print(f"{outcome}: {name}, {kind}, {len(abouts)} runs, e.g. {abouts[0]}"[:400])
    for kind, count in counts.items():
        print(f"{kind}: {count.total()} runs, {dict(count)}")
    if args.verbose:
        print("dense for want of a rule:", dense_ops.most_common(60))


if __name__ == "__main__":
    main()
