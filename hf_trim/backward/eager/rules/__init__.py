"""Rules: how ATen's ops work on tensors of which the kept rows are in memory."""

from hf_trim.backward.eager.rules import activations, attention, indexing, nn, pointwise  # noqa: F401
