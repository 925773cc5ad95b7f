"""Numbers and tables as Markdown."""

from math import isnan
from statistics import fmean, stdev


def number(value: float, digits: int, sign: str = "") -> str:
    """Format a number. NaN becomes a dash.

    >>> number(0.25, 3, "+"), number(float("nan"), 3)
    ('+0.250', '-')
    """
    # adding 0.0 drops the sign of a zero; the format code for that needs Python 3.11
    return "-" if isnan(value) else f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def significant(value: float) -> str:
    """Format three significant digits without an exponent.

    >>> significant(1234567.0), significant(12.345), significant(0.001234), significant(0.00000123)
    ('1,234,567', '12.3', '0.00123', '0.00000123')
    """
    if value >= 999.5:
        return f"{value:,.0f}"
    said = f"{value:.3g}"
    return f"{value:.8f}".rstrip("0") if "e" in said else said


def mean_sd(values: list[float], digits: int, sign: str = "") -> str:
    """Format mean ± standard deviation, or a single value alone.

    >>> mean_sd([1.0, 3.0], 1)
    '2.0 ± 1.4'
    """
    mean = number(fmean(values), digits, sign)
    # stdev raises on NaN
    return mean if len(values) < 2 or any(map(isnan, values)) else f"{mean} ± {number(stdev(values), digits)}"


def markdown(rows: list[list[str]]) -> list[str]:
    r"""Return the lines of a table. The first row is its head.

    >>> print(*markdown([["", "score"], ["own", "1"]]), sep="\n")
    |     | score |
    |-----|-------|
    | own | 1     |
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    return [line(rows[0]), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows[1:])]


def between(text: str, content: str, name: str, markers: tuple[str, str]) -> str:
    """Replace the text between two markers. Raise a ValueError unless it has each of them once, in order."""
    start, end = markers
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"{name} must have one line {start!r} and after it one line {end!r}.")
    before, rest = text.split(start)
    return f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"
