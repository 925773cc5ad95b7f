"""Tables and numbers as Markdown."""

from collections.abc import Sequence


def significant(value: float) -> str:
    """Write three significant digits, without powers of ten.

    >>> significant(1234567.0), significant(12.345), significant(0.001234), significant(0.00000123)
    ('1,234,567', '12.3', '0.00123', '0.00000123')
    """
    if value >= 999.5:
        return f"{value:,.0f}"
    said = f"{value:.3g}"
    return f"{value:.8f}".rstrip("0") if "e" in said else said


def details(title: str, body: str) -> str:
    """Fold something away."""
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table whose columns are aligned in the source, too.

    >>> print(markdown_table(["", "ms"], [["one", "1"]]))
    |     | ms |
    |-----|----|
    | one | 1  |
    """
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(lines[0]), rule, *map(line, lines[1:])])
