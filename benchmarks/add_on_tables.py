"""What the add-ons cost, as Markdown: at one shape, as it grows, and in a few words."""

from examples.markdown import markdown, number, significant

from benchmarks.add_ons import ADD_ONS
from benchmarks.bars import here
from benchmarks.results import Key, Results, Row
from benchmarks.suites.growth import LONGEST_STEP, MIN_SIZES, NEIGHBORS, REFERENCE, Slope, fit, history

POWERS = {0: "constant", 1: "linear", 2: "quadratic"}
LEAST_RATIO = 0.01


def growth_of(results: Results, axis: str, name: str, value: str) -> Slope | None:
    """Fit the slope of a ``"step"`` or what is ``"allocated"`` along an axis, over its five largest sizes.

    Smaller ones measure the calling.
    """
    # nothing has no logarithm
    known = [point for point in history(results, NEIGHBORS, axis, name, value) if point[1] > 0]
    return fit(known[-MIN_SIZES:])


def in_short(results: Results) -> dict[str, str]:
    """Say what each add-on costs as the README does, such as ``"0.12x, linear"``: how it grows with patches."""
    found = {}
    for one in ADD_ONS:
        row = _at_reference(results, one.axis, one.name)
        if row is not None and "ratio" in row.values:
            found[one.name] = f"{times(row.number('ratio'))}, {POWERS[one.time if one.axis == 'H*W' else 0]}"
    return found


def times(ratio: float) -> str:
    """Write a ratio."""
    return f"{significant(ratio)}x" if ratio >= LEAST_RATIO else f"<{LEAST_RATIO}x"


def add_on_parts(results: Results) -> list[str]:
    """Lay out what was measured of them."""
    first = here(results)[0]
    head = ["", "ms", "MB", "in", "slope of time", "slope of memory"]
    table = [_line(results, first, "H*W", 1, 1)]
    table += [_line(results, one.name, one.axis, one.time, one.memory) for one in ADD_ONS]
    one = REFERENCE
    note = (
        f"{one['B']} clips of {one['T']} frames of {one['H']}x{one['W']} patches, {one['D']} channels, {one['S']} "
        f"slots, {one['Kp']:,} prototypes for 10 tokens of a frame, a model of {one['weights'] / 1e6:.1f} million "
        f"weights. A step is the forward and, where there is a gradient, the backward. In brackets: times {first} at "
        f"the same shape, taken in turn; behind slopes, the exponent that they should not exceed. Slopes are those of "
        f"the {MIN_SIZES} largest sizes, up to a step of {LONGEST_STEP[NEIGHBORS]:g} s."
    )
    return [note, "\n".join(markdown([head, *(line for line in table if line)]))]


def _line(results: Results, name: str, axis: str, time: int, memory: int) -> list[str]:
    """Write a line about something, or nothing where it was not measured."""
    row, base = (_at_reference(results, axis, who) for who in (name, here(results)[0]))
    if row is None:
        return []
    cells = [row.status, ""]
    if "step" in row.values and base is not None and "step" in base.values:
        held = row.number("allocated")
        cells = [significant(1e3 * row.number("step")), significant(held / 1e6)]
        if row is not base:
            cells[0] += f" ({times(row.number('ratio'))})"
            cells[1] += f" ({times(held / base.number('allocated'))})"
    for value, power in (("step", time), ("allocated", memory)):
        slope = growth_of(results, axis, name, value)
        cells.append(f"{number(slope.exponent, 2)} ({power})" if slope is not None and slope.enough else f"- ({power})")
    return [name, *cells[:2], axis.replace("*", "·"), *cells[2:]]


def _at_reference(results: Results, axis: str, name: str) -> Row | None:
    """Return the row of the shape that all sweeps go through."""
    return results.rows.get(Key(NEIGHBORS, axis, name, tuple(REFERENCE.items())))
