"""
The tables and the picture of the READMEs, from the records in `recipes/results`.

`python -m tests.support.readme_tables` makes them again. A table stands behind a comment that names its records
and what it shows of them, e.g. `<!-- report: battery.json | verdicts -->`: `verdicts` or `all` (a row for each
comparison), `paper` (these, and the rows of the paper's Table 1), or the title of one comparison.
"""

import re
from pathlib import Path

from hf_trim.report import find_records, group, markdown_table, table_rows
from hf_trim.report.cost_plot import plot_costs
from hf_trim.report.summary import PAPER
from hf_trim.report.tables import overview_rows, paper_cells
from hf_trim.report.verdict import verdict_rows


ROOT = Path(__file__).parents[2]
READMES = (ROOT / "README.md", ROOT / "recipes" / "README.md")
RESULTS = ROOT / "recipes" / "results"
PICTURE = RESULTS / "battery.png"
TABLE = re.compile(r"(<!-- report: (.+?) \| (.+?) -->\n\n)\n*(?:\|.*\n)*\n*")


def make_again(text: str) -> str:
    """The text of a README, with the tables of the committed records."""
    # The blank line behind a table is its end: text would be shown as a row of it.
    return TABLE.sub(lambda found: f"{found[1]}{_table(found[2].split(), found[3])}\n", text).rstrip("\n") + "\n"


def draw(path: Path) -> None:
    """The picture that the project's README opens with."""
    assert plot_costs(group(find_records([str(RESULTS / "battery.json")])), path)


def _table(names: list[str], shown: str) -> str:
    groups = group(find_records([str(RESULTS / name) for name in names]))
    made = {"all": overview_rows, "paper": _beside_the_paper, "verdicts": verdict_rows}.get(shown)
    return markdown_table(*(made(groups) if made else table_rows(groups[shown])))


def _beside_the_paper(groups: dict[str, list[dict]]) -> tuple[list[str], list[list[str]]]:
    head, rows = overview_rows(groups)
    arms = ["plain", "trimmed", "random"]  # what `overview_rows` shows of records of these arms
    return head, rows + [[f"{recipe} (paper)", *paper_cells(recipe, arms)] for recipe in PAPER]


if __name__ == "__main__":
    for readme in READMES:
        readme.write_text(make_again(readme.read_text(encoding="utf-8")), encoding="utf-8")
    draw(PICTURE)
