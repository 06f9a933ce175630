"""
A recorded backward pass. The row-sparse engine (`eager/`) runs Python for each op of the backward pass, and nearly all
steps of a training run the same ops again. So they are recorded once, as a flat list of ATen ops on the kept rows, and
run from C++ in later steps, on the saved tensors of the new graph.

e.g. a linear layer, `[B, H]` → `[B, C]`, B = 4, rows 1 and 3 kept: the tape takes the kept rows of the saved input,
`[2, H]`, and multiplies them by the gradient, `[2, C]`. That makes the gradient of the weight, `[C, H]`.

| where | what |
|---|---|
| `graph.h` | a graph: its key, its saved tensors, its leaves |
| `program.h` | the ops' interpreter, and how gradients get to the leaves |
| `tape.cpp` | both from Python |
| `build.py`, `extension.py` | compiles it once, in the background; imports it |
| `recorder.py` | the ops that a backward pass runs → a program |
| `counts.py` | two of them, for different numbers of kept rows → one for any number |
| `entry.py` | where a tape begins |
| `tapes.py` | which graphs have a tape: record, compare, run |
"""
