"""
Rules of the proof, one for each op: where its result carries the rows, and where it is zero. Most follow from the
facts (`derived.py`); those of ops that do more are written by hand.

A rule gets

- the [`~hf_trim.backward.compiled.proof.Propagation`] through the graph, which makes results and checks them,
- the op's name and the symbolic shape of its result (a list of shapes if it has several results),
- the op's arguments, tensors as [`~hf_trim.backward.compiled.values.Value`].

What it returns must hold for the op on the whole batch and on any of its rows. Where that is not known, it raises
[`~hf_trim.backward.registry.NotRowwiseError`]. Its message completes the sentence "<op>: ...".

Example: `aten.mm(a, b)` of `[16, s0*5]` and `[s0*5, 16]`, whose dimensions 1 and 0 carry rows with 5 tokens behind
each, calls the rule `_mm(prop, "mm", (16, 16), a, b)`. It returns a value without rows, if `a` or `b` is zero outside
of the kept ones.

Composite ops such as `reshape` need no rule: AOTAutograd's graphs hold what they are made of, such as `view`.
"""

from hf_trim.backward.compiled.proof_rules import (  # noqa: F401
    constants,
    indexing,
    pointwise,
    products,
    views,
)
from hf_trim.backward.compiled.proof_rules.derived import register_derived_rules


register_derived_rules()
