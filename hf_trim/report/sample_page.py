"""
A page with the samples that stand out: rows of a memory of losses → an HTML file that needs no other file.
"""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from hf_trim.files import replaced
from hf_trim.messages import shorten
from hf_trim.trainer.memory import SampleMemory


TEMPLATE = Path(__file__).with_suffix(".html")
SHOWN = 20  # samples of each table
PICTURE_SIZE = 96  # pixels
SHOWN_CHARACTERS = 400
WIDTH, HEIGHT = 120, 28  # of a line of losses, in pixels
TABLES = {
    "mean_loss": ("The hardest", "Samples with the highest mean loss over the training."),
    "label_error": (
        "Candidates for wrong labels",
        "Samples whose loss was high whenever they were seen: the mean loss minus its standard deviation is highest. "
        "Wrong labels are a frequent reason, an odd sample another one: look at them before you change anything.",
    ),
    "kept": ("The most often kept", "Samples that the training kept most often; of equal ones the hardest first."),
}


def write_sample_page(
    memory: SampleMemory,
    path: Path,
    title: str,
    label_names: list[str],
    rows: Any = None,
    show: Callable[[int], Any] | None = None,
    data_map: Path | None = None,
) -> None:
    """
    Write the page.

    Args:
        memory ([`~hf_trim.trainer.memory.SampleMemory`]): What a training has seen of its samples.
        path (`Path`): The HTML file.
        title (`str`): What was trained.
        label_names (`list[str]`): Names of the classes; none where there are none.
        rows (`Sequence[int]`, *optional*): For each sample its row in the data as they were read.
        show (`Callable`, *optional*): From the index of a sample to its text, or its picture (`PIL.Image.Image`).
            Without it the page has numbers and classes only.
        data_map (`Path`, *optional*): A PNG file to show, see [`~hf_trim.report.data_map.plot_data_map`].
    """
    table = memory.to_dict()
    seen = table["seen"] > 0
    orders = ["mean_loss"]
    if memory.is_classification and table["seen"].max() > 1:  # else the loss has not varied
        orders.append("label_error")
    if (table["kept"] < table["seen"]).any():
        orders.append("kept")
    has_losses = len(memory.history) > 1
    tables = []
    for order in orders:
        shown = memory.hardest(SHOWN, order)
        for row in shown:
            row["line"] = _line(row["losses"])
            row["row"] = None if rows is None else rows[row["index"]]
            row |= {f"{x}_name": _class_name(label_names, row.get(x, -1)) for x in ("label", "prediction")}
            row |= {} if show is None else _as_shown(show(row["index"]))
        tables.append({"title": TABLES[order][0], "explanation": TABLES[order][1], "rows": shown})
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, trim_blocks=True)
    page = environment.get_template(TEMPLATE.name).render(
        title=title,
        introduction=f"Of {len(seen):,} training samples, {int(seen.sum()):,} were seen, each up to "
        f"{int(table['seen'].max())} times. The loss is that of a sample before each training step.",
        tables=tables,
        has_samples=show is not None,
        has_rows=rows is not None,
        has_labels=memory.is_classification,
        has_losses=has_losses,
        data_map=None if data_map is None else _data_url(data_map.read_bytes()),
    )
    with replaced(path) as part:
        part.write_text(page, encoding="utf-8")


def _class_name(names: list[str], number: int) -> str:
    return names[number] if 0 <= number < len(names) else "?" if number < 0 else str(number)


def _as_shown(sample: Any) -> dict[str, str]:
    """A text, cut, or a small picture within the page."""
    if isinstance(sample, str):
        return {"text": shorten(sample, SHOWN_CHARACTERS)}
    picture = sample.copy()
    picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    file = io.BytesIO()
    picture.convert("RGB").save(file, format="PNG")
    return {"picture": _data_url(file.getvalue())}


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _line(losses: list[float | None]) -> str:
    """Points of a line from the left to the right; the bottom is a loss of 0."""
    known = [(epoch, loss) for epoch, loss in enumerate(losses) if loss is not None]
    top = max([loss for _, loss in known] + [1e-9])
    step = WIDTH / max(len(losses) - 1, 1)
    return " ".join(f"{epoch * step:.1f},{HEIGHT * (1 - max(loss, 0) / top):.1f}" for epoch, loss in known)
