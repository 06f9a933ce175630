"""
Why a compiled graph runs on the whole batch.

Example: `x.softmax(0)` on `[B, C]` has a backward op that sums over the dimension of the rows. Its proof rule raises
`NotRowwiseError("...")`, the proof ends with that reason, and the call ends in `GraphRefusedError` with the same one.
"""


class GraphRefusedError(Exception):
    """A compiled graph cannot run on the kept rows. The message says why."""
