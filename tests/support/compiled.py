"""What the tests of compiled models share."""

import torch

from hf_trim.backward.compiled.backend import mark_batch_dynamic
from hf_trim.backward.eager.sparse import take_rows_sparse
from hf_trim.backward.settings import REFUSED_GRAPHS, fallback_report
from tests.backward.test_sparse_models import (
    KEPT,
    TIMM_MODELS,
    TRANSFORMERS,
    build,
    classification_losses,
    difference,
    gradients,
)


# The graphs are inductor's, but run op by op: no C++ compiler is waited for.
DECOMPOSED = "aot_eager_decomp_partition"


def check(model, runs, losses_of=classification_losses, kept=KEPT, autocast=None, tolerance=1e-5, graphs=1,
          backend=DECOMPOSED):  # fmt: skip
    """A compiled model's gradients on the kept rows are its dense ones, of every graph of it."""
    call = torch.compile(model, backend=backend)

    def losses(_, inputs, labels):
        mark_batch_dynamic({**inputs, "labels": labels}, len(labels))
        return losses_of(call, inputs, labels)

    kept = torch.tensor(kept)
    dense = gradients(model, lambda each: each[kept], losses, autocast)
    sparse = gradients(model, lambda each: take_rows_sparse(each, kept), losses, autocast)
    assert not REFUSED_GRAPHS and not fallback_report()
    assert runs == [(len(kept), max(2, len(kept)))] * graphs
    assert difference(sparse, dense) <= tolerance


def small(name, attention="sdpa", head=None, **changes):
    """A model of one layer; two take twice as long to compile."""

    def config():
        config = {**TRANSFORMERS, **TIMM_MODELS}[name]()
        if name in TRANSFORMERS:
            config.num_hidden_layers = 1
            vars(config).update(changes)
        return config

    return build(config, attention, head)
