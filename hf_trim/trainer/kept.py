"""
Between steps 3 and 4 of: batch → per-item losses → keep decision → trimmed backward → logs.

For example, losses `[8]` of which 2 are kept: `Kept(elements=[1, 6], factor=0.5)` on the CPU. On a GPU, where the host
would wait for the number of items with a label, it may be 3 elements, 1, 4 and 6, with `is_kept` true, false, true.
"""

from typing import NamedTuple

from torch import Tensor

from hf_trim.backward.eager.rows import Rows


class Kept(NamedTuple):
    """
    What is kept of a call's losses.

    Args:
        elements (`torch.Tensor`): `[k]` indices of the kept losses.
        factor (`torch.Tensor`): The gradient of each of them for a weight of 1: 1/k where the call takes a mean.
        rows ([`~hf_trim.backward.eager.rows.Rows`], *optional*): The kept samples, if the backward pass is row-sparse.
        is_kept (`torch.Tensor`, *optional*): `[k]`, which of these are kept, where only the device knows: the others
            get a gradient of zero.
    """

    elements: Tensor
    factor: Tensor
    rows: Rows | None = None
    is_kept: Tensor | None = None
