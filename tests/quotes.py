"""The numbers of README.md that were measured: ``python -m tests.quotes`` writes them again from where they stand.

A table below ``<!-- quotes: PAGE, TEXT -->`` has rows and columns of the first table after that text in that page. What
an add-on costs stands behind its name and a colon.
"""

import re
from pathlib import Path

from benchmarks.results import Results
from benchmarks.tables import in_short

ROOT = Path(__file__).resolve().parents[1]
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
    """Return a table with its values as they are now."""
    start, page, text, table = match.groups()
    there = table_after((ROOT / page).read_text(encoding="utf-8"), text)
    head, ruler, *rows = table.splitlines()
    names = [cells(row)[0] for row in rows]
    lines = [[name, *(there[name, column] for column in cells(head)[1:])] for name in names]
    return "\n".join([f"{start}{head}", ruler, *(f"| {' | '.join(line)} |" for line in lines), ""])


def again(readme: str) -> str:
    """Return the README with all of its numbers as they are now."""
    costs = in_short(Results.load(ROOT / "benchmarks" / "results" / "cpu.json"))
    return COST.sub(lambda found: f"{found[1]}: {costs[found[1]]}", QUOTE.sub(quoted, readme))


if __name__ == "__main__":
    page = ROOT / "README.md"
    page.write_text(again(page.read_text(encoding="utf-8")), encoding="utf-8")
