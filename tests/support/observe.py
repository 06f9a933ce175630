"""What tests observe of the backward pass: recomputations and compiled graphs that ran on kept rows."""

from hf_trim.backward.compiled.graph import CompiledBackward
from hf_trim.backward.eager import checkpoint


def count_recomputations(monkeypatch) -> dict[str, int]:
    """
    Count the recomputations of checkpoints from here on.

    Args:
        monkeypatch (`pytest.MonkeyPatch`): Ends the counting with the test.

    Returns:
        `dict[str, int]`: `"kept"`, how many recomputed the kept rows alone, and `"all"`, how many had to recompute
        everything after that.
    """
    counts = {"kept": 0, "all": 0}

    def counting(name, function):
        def call(*args):
            counts[name] += 1
            return function(*args)

        return call

    for name, function in (("kept", "check_recomputed"), ("all", "forget_recomputed")):
        monkeypatch.setattr(checkpoint, function, counting(name, getattr(checkpoint, function)))
    return counts


def record_graph_runs(monkeypatch) -> list[tuple[int, int | None]]:
    """
    Record the runs of compiled backward graphs on kept rows from here on.

    Args:
        monkeypatch (`pytest.MonkeyPatch`): Ends the recording with the test.

    Returns:
        `list[tuple[int, int | None]]`: For each run the number of kept rows, and of the rows that the graph ran on.
    """
    runs, run_on_rows = [], CompiledBackward._run_on_rows

    def recording(self, ctx, args, call, plan, values):
        gradients = run_on_rows(self, ctx, args, call, plan, values)
        runs.append((call.rows.count, self.planner.sizes(plan, call.rows, values).row_count))
        return gradients

    monkeypatch.setattr(CompiledBackward, "_run_on_rows", recording)
    return runs
