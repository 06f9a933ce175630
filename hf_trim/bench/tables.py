"""A table of what was measured of a model."""

from rich.table import Table

from hf_trim.bench.arguments import BenchArguments
from hf_trim.bench.steps import COMPILED


COLUMNS = (
    "p", "k", "mode", "forward\nms", "backward\nms", "step\nms", "to\ndense", "bound", "of\nbound", "to un-\ntrimmed",
    "peak\nMB", "error",
)  # fmt: skip


def make_table(name: str, result: dict, args: BenchArguments) -> Table:
    """
    Args:
        name (`str`): The model.
        result (`dict`): What was measured of it.
        args ([`~hf_trim.bench.arguments.BenchArguments`]): Sizes.

    Returns:
        `rich.table.Table`: A row per p and mode.
    """
    title = f"{name}: {result['parameters'] / 1e6:.1f}M parameters, batch {args.batch_size}, {args.dtype}"
    if args.gradient_checkpointing:
        title += ", gradient checkpointing"
    table = Table(title=title, caption=_make_caption(result, args))
    for head in COLUMNS:
        table.add_column(head, justify="left" if head == "mode" else "right", no_wrap=True)
    last_mode = result["steps"][-1]["mode"]
    for row in result["steps"]:
        has_bound = row["mode"].removeprefix(COMPILED) in ("sparse", "replay")
        error = row["gradient_error"] if has_bound else None
        table.add_row(
            f"{row['keep']:g}",
            str(row["k"]),
            row["mode"],
            f"{row['forward']['median'] * 1000:.1f}",
            f"{row['backward']['median'] * 1000:.1f}",
            f"{row['step']['median'] * 1000:.1f} ± {row['step']['iqr'] * 1000:.1f}",
            f"{row['speedup_to_dense']:.2f}×",
            f"{row['bound']:.2f}×" if has_bound else "–",
            f"{row['fraction_of_bound'] * 100:.0f} %" if has_bound else "–",
            f"{row['speedup_to_untrimmed']:.2f}×",
            f"{row['peak_memory_bytes'] / 1e6:.1f}",
            "–" if error is None else f"{error:.0e}",
            end_section=row["mode"] in ("untrimmed", last_mode),  # a line below each p
        )
    return table


def _make_caption(result: dict, args: BenchArguments) -> str:
    lines = [
        "Medians; step ± interquartile range. Speed-ups: medians of the ratios within a round. Peak: beyond weights."
    ]
    speedups = ", ".join(f"{mode} {speedup:.2f}×" for mode, speedup in result["schedule_speedup"].items())
    if speedups:
        lines.append(f"Schedule 1.0 → 0.2 in {args.schedule_epochs} epochs, without the optimizer: {speedups}")
    if args.torch_compile:
        slow = [f"{row['mode']} {row['first_seconds']:.1f} s" for row in result["steps"] if row["first_seconds"] > 2]
        lines.append(f"First steps that took more than 2 s, compilation included: {', '.join(slow) or 'none'}")
    fallbacks = sum(sum(row["fallbacks"].values()) for row in result["steps"])
    lines.append(f"Ops without a row-sparse rule that ran dense: {fallbacks or 'none'}")
    return "\n".join(lines)
