"""
Rules of the proof, one for each op: where its result carries the rows, and where it is zero.

A rule gets

- the [`~hf_trim.backward.compiled.proof.Propagation`] through the graph, which makes results and checks them,
- the op's name and the symbolic shape of its result (a list of shapes if it has several results),
- the op's arguments, tensors as [`~hf_trim.backward.compiled.values.Value`].

What it returns must hold for the op on the whole batch and on any of its rows. Where that is not known, it raises
[`~hf_trim.backward.compiled.errors.RowsMixedError`]. Its message completes the sentence "<op>: ...".

Example: `aten.permute(x, [1, 0])` of a value `[s0*5, 16]`, whose dimension 0 carries rows with 5 tokens behind each,
calls the rule `_permute(prop, "permute", (16, 5*s0), x, [1, 0])`. It returns a value with rows in dimension 1 and
inner 5.

Composite ops such as `reshape` need no rule: AOTAutograd's graphs hold what they are made of, such as `view`.
"""

from hf_trim.backward.compiled.proof_rules import (  # noqa: F401
    constants,
    indexing,
    layers,
    pointwise,
    products,
    reductions,
    views,
)
