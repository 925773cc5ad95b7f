"""Copies numbers from their sources into README.md and examples/README.md: ``python -m tests.quotes``.

A table below ``<!-- quotes: PAGE, TEXT -->`` has rows and columns of the first table after TEXT in PAGE. PAGE may also
be a file of results, whose printed table is used. The cost of an add-on follows its name and a colon. The study's table
stands between its markers.
"""

import re
from pathlib import Path

from benchmarks.results import Results
from benchmarks.tables import in_short
from examples.markdown import between
from examples.report import Report
from examples.report import table as printed
from examples.study_report import Rows, short

ROOT = Path(__file__).resolve().parents[1]
PAGES = "examples/README.md", "README.md"
STUDY = "<!-- study: python examples/study.py --table examples/study -->", "<!-- end of study -->"
QUOTE = re.compile(r"(<!-- quotes: (\S+), (.*) -->\n)((?:\|.*\n)+)")
COST = re.compile(r"(?<=[|;] )([^|;`]+): <?[\d.,]+x, \w+")


def cells(line: str) -> list[str]:
    """Split a line of a table.

    >>> cells("| own losses | 0.386 |")
    ['own losses', '0.386']
    """
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table_after(page: str, text: str) -> dict[tuple[str, str], str]:
    """Return the values of the first table after a text by row and column."""
    found = re.search(r"(?:^\|.*\n)+", page[page.index(text) :], flags=re.MULTILINE)
    if found is None:
        raise ValueError(f"no table after {text!r}")
    head, _, *rows = map(cells, found[0].splitlines())
    return {(row[0], column): value for row in rows for column, value in zip(head[1:], row[1:], strict=True)}


def quoted(match: re.Match[str]) -> str:
    """Return a table with current values."""
    start, page, text, table = match.groups()
    path = ROOT / page
    content = printed(Report.load(path)) if path.suffix == ".json" else path.read_text(encoding="utf-8")
    there = table_after(content, text)
    head, ruler, *rows = table.splitlines()
    names = [cells(row)[0] for row in rows]
    lines = [[name, *(there[name, column] for column in cells(head)[1:])] for name in names]
    return "\n".join([f"{start}{head}", ruler, *(f"| {' | '.join(line)} |" for line in lines), ""])


def again(page: str) -> str:
    """Return a page with current numbers."""
    if STUDY[0] in page:
        rows = Rows(ROOT / "examples" / "study" / "rows.jsonl").load()
        page = between(page, short(rows), "the page", STUDY)
    costs = in_short(Results.load(ROOT / "benchmarks" / "results" / "cpu.json"))
    return COST.sub(lambda found: f"{found[1]}: {costs[found[1]]}", QUOTE.sub(quoted, page))


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(again(path.read_text(encoding="utf-8")), encoding="utf-8")
