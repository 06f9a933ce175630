"""
How ATen's ops work on tensors of which the kept rows are in memory: one rule an op. Most follow from the facts
(`derived.py`). Those of ops that do more are written by hand, and registered by
[`~hf_trim.backward.registry.implements`]: `activations.py` holds those of forward ops on activations, the other files
those of backward ops on row-sparse gradients.

A rule gets the op and its arguments and returns what the op returns. It must guarantee, for every input:

1. *Equality.* What it returns stands for the tensor that the dense op would return on the densified arguments. An
   output may be row-sparse only if the dense one is zero outside the kept rows. (Zero times anything counts as zero:
   an infinite activation of a sample that is not kept does no harm.)
2. *Independence of rows.* The op is run on payloads only if each row of its output depends on the same row of its
   row-carrying operands. If rows are summed (weight gradients), the sum over the kept rows is the sum over all.
3. *Every operand accounted for.* A dense operand that has the gradient's rows is sliced with
   [`~hf_trim.backward.eager.tensor.RowTensor.kept_rows`]. One that is broadcast over them is left as it is. Anything
   else raises [`~hf_trim.backward.registry.NotRowwiseError`]. `kept_rows` checks the size: a rule only names the
   dimension.
4. *No guessing.* For modes that it does not fully understand (training-mode batch norm, a reduced loss) it raises
   `NotRowwiseError`: the op then runs on densified arguments, and is counted.

e.g. `mm` for a weight's gradient, B = 4, T = 2, rows 1 and 3 kept: `grad.t() @ x` with `grad.t()`, `[C, B·T]`, payload
`[C, 2·2]`, rows along the summed dimension. The rule takes the kept rows of `x`, `[2·2, H]`, and returns the ordinary
`[C, H]` product of the two.
"""

from hf_trim.backward.eager.rules import (  # noqa: F401 (each registers its rules)
    activations,
    indexing,
    joins,
    nn,
    pointwise,
    reductions,
    views,
)
from hf_trim.backward.eager.rules.derived import register_derived_rules


register_derived_rules()
