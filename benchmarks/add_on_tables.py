"""What the add-ons cost, as Markdown: at one shape, as it grows, and in a few words."""

from examples.markdown import significant

from benchmarks.add_ons import ADD_ONS
from benchmarks.bars import here
from benchmarks.cells import base_of, details, markdown_table, memory_cell, shown, stops, time_cell, times
from benchmarks.contenders import PARTS
from benchmarks.results import Results, Row
from benchmarks.slopes import MIN_SIZES, Slope, fit
from benchmarks.suites.add_ons import GROWTH, LONGEST_STEP, REFERENCE, SUITE, UNITS, shape_of, size_of
from benchmarks.suites.sweep import MEASURES

POWERS = {0: "constant", 1: "linear", 2: "quadratic"}
SEMANTIC = [one.name for one in ADD_ONS if one.of == "SemanticConsistencyLoss"]


def growth_of(results: Results, axis: str, name: str, measure: str) -> Slope | None:
    """Fit the slope of the time or the memory of what is measured along an axis, over its five largest sizes.

    Smaller ones measure the calling.

    Args:
        results: of one machine.
        axis: along which it grows.
        name: of an add-on, or of SSync.
        measure: ``"time"`` or ``"memory"``.
    """
    known = GROWTH.history(results, axis, name, measure, "step" if measure == "time" else "allocated")
    # nothing has no logarithm
    return fit([(size, cost) for size, cost in known if cost > 0][-MIN_SIZES:])


def costs(results: Results) -> dict[str, str]:
    """Say in a few words what each add-on that was measured costs, such as ``"0.12x SSync, linear in patches"``.

    The exponent that was measured stands in brackets behind the one that is right.
    """
    found = {}
    for one in ADD_ONS:
        time = _at_reference(results, one.axis, one.name, "time")
        if time is not None and time.status == "measured" and base_of(results, time) is not None:
            slope = growth_of(results, one.axis, one.name, "time")
            grown = f" ({slope.exponent:.2f})" if slope is not None and slope.enough and one.time else ""
            how = f"{POWERS[one.time]} in {UNITS[one.axis]}" if one.time else POWERS[0]
            found[one.name] = f"{times(time.number('ratio'))} SSync, {how}{grown}"
    return found


def in_short(results: Results) -> dict[str, str]:
    """Say what each add-on costs as the README does, such as ``"0.12x, linear"``: how it grows with patches."""
    found = {}
    for one in ADD_ONS:
        time = _at_reference(results, one.axis, one.name, "time")
        if time is not None and time.status == "measured" and base_of(results, time) is not None:
            found[one.name] = f"{times(time.number('ratio'))}, {POWERS[one.time if one.axis == 'H*W' else 0]}"
    return found


def add_on_parts(results: Results) -> list[str]:
    """Lay out all that was measured of them."""
    return [
        _note(results),
        _table(results),
        *_bounded(results),
        "In a few words, a step in steps of SSync, and the measured exponent:",
        markdown_table(["add-on", "cost"], [[name, said] for name, said in costs(results).items()]),
        *(details(f"All rows in {shown(axis)}", _all_rows(results, axis)) for axis in UNITS),
        *stops(results, GROWTH),
    ]


def _note(results: Results) -> str:
    one, first = REFERENCE, here(results)[0].name
    return (
        f"{one['B']} clips of {one['T']} frames of {one['H']}x{one['W']} patches, features of {one['D']} numbers, "
        f"{one['S']} slots, {one['Kp']:,} prototypes for 10 tokens of a frame, a model of "
        f"{one['weights'] / 1e6:.1f} million weights; along one of these, other sizes. A step is the forward and, "
        f"where there is a gradient, the backward. In brackets: how many times that of {first} at the same shape, "
        f"taken in turn; behind slopes, the exponent that they should not exceed. Slopes are fitted to the {MIN_SIZES} "
        f"largest sizes. Here the longest step that is run is one that should take {LONGEST_STEP:g} s."
    )


def _table(results: Results) -> str:
    head = ["", "ms", "MB", "in", "sizes", "slope of time", "slope of memory"]
    table = [_line(results, here(results)[0].name, "H*W", 1, 1)]
    table += [_line(results, one.name, one.axis, one.time, one.memory) for one in ADD_ONS]
    return markdown_table(head, [line for line in table if line])


def _line(results: Results, name: str, axis: str, time: int, memory: int) -> list[str]:
    """Write a line about something, or nothing where it was not measured."""
    rows = [_at_reference(results, axis, name, measure) for measure in MEASURES]
    if rows[0] is None or rows[1] is None:
        return []
    slopes = [growth_of(results, axis, name, measure) for measure in MEASURES]
    known = slopes[1]
    sizes = f"{known.num_sizes}: {known.first:,} to {known.last:,}" if known else ""
    said = [
        f"{one.exponent:.2f} ({power})" if one is not None and one.enough else f"- ({power})"
        for one, power in zip(slopes, (memory, time), strict=True)
    ]
    return [name, time_cell(results, rows[1]), memory_cell(results, rows[0]), shown(axis), sizes, said[1], said[0]]


def _bounded(results: Results) -> list[str]:
    """Set the forms of the one loss of patches by patches beside each other."""
    rows = {
        (size_of("H*W", row.id.sizes), row.id.contender, row.id.measure): row
        for row in results.select(suite=SUITE, case="H*W")
        if row.id.contender in SEMANTIC
    }
    if not rows:
        return []
    table = [
        [f"{size:,}", *(_both(rows.get((size, name, "time")), rows.get((size, name, "memory"))) for name in SEMANTIC)]
        for size in sorted({size for size, _, _ in rows})
    ]
    return [
        "How the quadratic cost of `SemanticConsistencyLoss` is bounded: its memory by taking one pair of frames at a "
        "time (`chunk_size=1`, as it comes), time and memory by averaging patches first (`pool`), here by 2x2, or by "
        "as much as leaves at most 144 patches of a frame. ms, and MB, by patches of a frame:",
        markdown_table(["patches", *(name.split(", ")[1] for name in SEMANTIC)], table),
    ]


def _both(time: Row | None, memory: Row | None) -> str:
    if time is None or memory is None:
        return ""
    if time.status != "measured":
        return time.status
    return f"{significant(1e3 * time.number('step'))}, {significant(memory.number('allocated') / 1e6)}"


def _all_rows(results: Results, axis: str) -> str:
    head = [UNITS[axis], "", "forward ms", "backward ms", "step ms", "IQR", "MB"]
    order = {name: place for place, name in enumerate([here(results)[0].name, *(one.name for one in ADD_ONS)])}
    rows = results.select(suite=SUITE, case=axis, measure="time")
    table = []
    for row in sorted(rows, key=lambda row: (size_of(axis, row.id.sizes), order.get(row.id.contender, len(order)))):
        size = size_of(axis, row.id.sizes)
        cells = [row.status, "", "", ""]
        if row.status == "measured":
            parts = [significant(1e3 * row.number(part)) if part in row.values else "" for part in PARTS]
            cells = [*parts, time_cell(results, row), f"{row.spread('step').noise:.0%}"]
        memory = results.rows.get(GROWTH.key(axis, row.id.contender, "memory", row.id.sizes))
        table.append([f"{size:,}", row.id.contender, *cells, "" if memory is None else memory_cell(results, memory)])
    return markdown_table(head, table)


def _at_reference(results: Results, axis: str, name: str, measure: str) -> Row | None:
    """Return the row of the shape that all sweeps go through."""
    return results.rows.get(GROWTH.key(axis, name, measure, shape_of(axis, size_of(axis, REFERENCE))))
