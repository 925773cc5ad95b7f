"""Numbers and tables as Markdown."""

from math import isnan
from statistics import fmean, stdev


def number(value: float, digits: int, sign: str = "") -> str:
    """Write a number; NaN is a dash.

    >>> number(0.25, 3, "+"), number(float("nan"), 3)
    ('+0.250', '-')
    """
    # rounded by itself, and without the sign of a zero: Python 3.11 has a format for that
    return "-" if isnan(value) else f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def significant(value: float) -> str:
    """Write three significant digits, without powers of ten.

    >>> significant(1234567.0), significant(12.345), significant(0.001234), significant(0.00000123)
    ('1,234,567', '12.3', '0.00123', '0.00000123')
    """
    if value >= 999.5:
        return f"{value:,.0f}"
    said = f"{value:.3g}"
    return f"{value:.8f}".rstrip("0") if "e" in said else said


def mean_sd(values: list[float], digits: int, sign: str = "") -> str:
    """Write mean ± standard deviation, of one value the value.

    >>> mean_sd([1.0, 3.0], 1)
    '2.0 ± 1.4'
    """
    mean = number(fmean(values), digits, sign)
    # stdev of NaN is an error
    return mean if len(values) < 2 or any(map(isnan, values)) else f"{mean} ± {number(stdev(values), digits)}"


def markdown(rows: list[list[str]]) -> list[str]:
    r"""Lay out a table, its head first, line by line.

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
    """Replace what stands between two markers of a text; a ValueError says if it has not both, once and in order."""
    start, end = markers
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"{name} must have one line {start!r} and after it one line {end!r}.")
    before, rest = text.split(start)
    return f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"
