"""What the tables of everything that grows have in common: cells with ratios, and where something stopped."""

from collections.abc import Sequence

from examples.markdown import markdown, significant

from benchmarks.bars import here
from benchmarks.results import Results, Row, RowId
from benchmarks.suites.sweep import Growth

LEAST_RATIO = 0.01


def details(title: str, body: str) -> str:
    """Fold something away."""
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table."""
    return "\n".join(markdown([list(head), *map(list, rows)]))


def base_of(results: Results, row: Row) -> Row | None:
    """Return what a row is compared with, if that has a number."""
    one = row.id
    key = RowId(one.suite, one.case, here(results)[0].name, one.measure, one.shape, one.dtype)
    base = results.rows.get(key)
    return base if base is not None and base.status == "measured" else None


def time_cell(results: Results, row: Row) -> str:
    """Write ms, and how many times those of what it is compared with they are."""
    return _cell(results, row, 1e3 * row.number("step"), row.number("ratio")) if row.values else row.status


def memory_cell(results: Results, row: Row) -> str:
    """Write MB, and how many times those of what it is compared with they are."""
    base = base_of(results, row)
    if not row.values:
        return row.status
    held = row.number("allocated")
    return _cell(results, row, held / 1e6, held / base.number("allocated") if base else 1.0)


def _cell(results: Results, row: Row, value: float, ratio: float) -> str:
    return significant(value) + (f" ({times(ratio)})" if base_of(results, row) not in (None, row) else "")


def times(ratio: float) -> str:
    """Write a ratio."""
    return f"{significant(ratio)}x" if ratio >= LEAST_RATIO else f"<{LEAST_RATIO}x"


def shown(axis: str) -> str:
    """Write an axis."""
    return axis.replace("*", "·")


def stops(results: Results, growth: Growth) -> list[str]:
    """Say once for every sweep and contender where it stopped, and why."""
    first: dict[tuple[str, str], Row] = {}
    for row in results.select(suite=growth.suite, measure="memory"):
        if row.status in ("time", "memory"):
            first.setdefault((row.id.case, row.id.contender), row)
    lines = [
        f"- {name}, {shown(axis)}, at {growth.size_of(axis, row.id.sizes):,} {growth.unit(axis)}, for {row.status}: "
        f"{row.note}."
        for (axis, name), row in first.items()
    ]
    return ["Where they stop, and why:", "\n".join(lines)] if lines else []
