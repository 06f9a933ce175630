"""Rules of the proof: where an op of a backward graph leaves the rows, and where its result is zero."""

from hf_trim.backward.compiled.proof_rules import views  # noqa: F401
