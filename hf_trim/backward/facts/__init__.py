"""
What is true of an op, whoever asks: which operands carry rows, and where its results then have them.

| file | what it holds |
|---|---|
| `table.py` | the facts: a line for each op |
| `fact.py` | what a line says, and the functions that say where rows are |
| `pointwise.py` | elementwise ops: which these are, and where their results are zero |

Both engines derive rules from the facts: `eager/rules/derived.py` runs an op on the kept rows of its operands, and
`compiled/proof_rules/derived.py` says which rows its results have. A rule is written by hand where an op needs more.

e.g. `native_layer_norm_backward` of `[B, T, C]`, normalized over C: `grad`, `x`, `mean` and `rstd` are sliced along
dimension 0, and so is the gradient of `x`. Those of weight and bias are sums over the rows. With rows in dimension 2
it is refused.
"""

from hf_trim.backward.facts.table import FACTS


__all__ = ["FACTS"]
