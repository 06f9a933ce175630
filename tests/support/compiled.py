"""What the tests of compiled models share."""

import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

from hf_trim.backward.compiled.backend import mark_batch_dynamic
from hf_trim.backward.eager.sparse import take_rows_sparse
from hf_trim.backward.settings import fallback_report, refused_graphs
from tests.support.models import (
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
    """A compiled model's gradients on the kept rows are the dense ones, in each graph. Returns their difference."""
    call = torch.compile(model, backend=backend)

    def losses(_, inputs, labels):
        mark_batch_dynamic({**inputs, "labels": labels}, len(labels))
        return losses_of(call, inputs, labels)

    kept = torch.tensor(kept, device=next(model.parameters()).device)
    dense = gradients(model, lambda x: x[kept], losses, autocast)
    sparse = gradients(model, lambda x: take_rows_sparse(x, kept), losses, autocast)
    assert not refused_graphs() and not fallback_report()
    assert runs == [(len(kept), max(2, len(kept)))] * graphs
    error = difference(sparse, dense)
    assert error <= tolerance, error
    return error


def small(name, attention="sdpa", head=None, **changes):
    """A model of one layer (or one in each stage): two take twice as long to compile."""
    if name in TIMM_MODELS:
        model = build(TIMM_MODELS[name])
        for part in model.stages if name == "convnext" else [model]:
            part.blocks = part.blocks[:1]
        return model

    def config():
        config = TRANSFORMERS[name]()
        config.num_hidden_layers = 1
        vars(config).update(changes)
        return config

    return build(config, attention, head)


def one_layer_bert(dropout=0.1, problem_type="single_label_classification"):
    """A classifier of `digit_texts`. Without its problem type, it would be compiled again when it has found it out."""
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=10, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        problem_type=problem_type,
    )  # fmt: skip
    return tf.BertForSequenceClassification(config)


def one_block_resnet():
    """A classifier of `digits`, with batch normalization."""
    config = tf.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=10,
        problem_type="single_label_classification",
    )  # fmt: skip
    return tf.ResNetForImageClassification(config)


class Net(nn.Module):
    """A little of everything, and a body to put something else in the middle of."""

    config = None

    def __init__(self, middle=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 3)
        self.middle = middle or nn.Sequential(nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.2))

    def forward(self, x):
        return self.last(self.middle(self.first(x.flatten(2).mean(-1))))


def net_losses(call, inputs, labels):
    return F.cross_entropy(call(inputs["x"]), labels, reduction="none")


class Do(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def gradients_of(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def step(call, net, x, labels, keep, take=take_rows_sparse):
    """The gradients of one step with fixed dropout masks."""
    net.zero_grad()
    torch.manual_seed(1)
    losses = F.cross_entropy(call(x), labels, reduction="none")
    kept = losses.detach().topk(max(1, round(keep * len(losses)))).indices.sort().values
    take(losses, kept).mean().backward()
    return gradients_of(net)


def dense_take(losses, kept):
    return losses[kept]
