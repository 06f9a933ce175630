"""
Proof rules of ops that make a tensor out of a number.

Example: `aten.full([s0, 16], 0.0)` is zero everywhere. Its dimension 0 carries rows, but it is equal all along it, so
its outer and inner size are `None`: they fit those of any tensor that it is added to. `prims.iota(s0)` is an index of
rows: 0, 1, 2, 3 for B = 4; and among the kept rows 1 and 3, it is 0, 1.
"""

from hf_trim.backward.compiled.values import Value, Zeros, is_equal
from hf_trim.backward.registry import PROOF, implements, require


@implements("full", "full_like", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "new_full",
      "scalar_tensor", table=PROOF)  # fmt: skip
def _constant(prop, name, shape, *args, **kwargs):
    if "full" in name or name == "scalar_tensor":
        value = args[0 if name == "scalar_tensor" else 2 if name == "new_full" else 1]
        prop.check_no_batch_size(value)
        require(not isinstance(value, Value), "it is not known what number a tensor is filled with")
    else:
        value = "ones" in name
    return prop.uniform_result(shape, Zeros.EVERYWHERE if value == 0 else Zeros.UNKNOWN)


@implements("iota", "arange", table=PROOF)
def _row_numbers(prop, name, shape, *args, start=None, step=None, **kwargs):
    if name == "arange":
        start, step = (args[0] if len(args) > 1 else 0), (args[2] if len(args) > 2 else 1)
    if not prop.row_dims(shape):
        prop.check_no_batch_size(args, start, step)
        return prop.result(shape)
    counts_them = start == 0 and step == 1 and is_equal(shape[0], prop.batch)
    require(counts_them, "it numbers the rows in another way than 0, 1, 2, ...")
    return prop.batch_first_result(shape, is_row_index=True)
