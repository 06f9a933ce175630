"""
The row-sparse backward pass of models compiled with `torch.compile`.

`torch.compile` makes one backward graph for all batch sizes if the batch dimension is dynamic. To compute the
gradients of 2 kept samples of 4, that graph is called with the rows of those 2 samples and the batch size 2:

| tensor | whole batch | 2 kept of 4 |
|---|---|---|
| incoming gradient, `[s0, C]` | `[4, C]`, zero in 2 rows | `[2, C]` |
| saved activation, `[s0*T, C]` | `[4*T, C]` | `[2*T, C]` |
| weight, `[C, C]` | `[C, C]` | the same |
| gradient of the weight, `[C, C]` | `[C, C]` | the same values |

| file | what it does |
|---|---|
| `backend.py` | compiles: the `hf_trim` backend and the settings that keep a backward graph |
| `graph.py` | runs a compiled backward graph on the kept rows |
| `plan.py` | decides which inputs are sliced, for each combination of gradients that arrive |
| `proof.py` | proves that the graph gives the same gradients on the kept rows |
| `proof_rules/` | the rules of that proof for ops of which the facts (`hf_trim/backward/facts/`) are not enough |
| `values.py` | what the proof knows of a tensor |
| `symbols.py` | the sizes of a graph as formulas, and their values in one call |
| `slices.py` | takes rows out of tensors, and pads them |
| `whole_batch.py` | ops that see the whole batch in a graph that runs on the kept rows |
| `comparison.py` | compares the first gradients with the dense ones |
| `errors.py` | why a graph runs on the whole batch instead |
"""
