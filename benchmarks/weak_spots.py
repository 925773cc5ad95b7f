"""What does not look good in a file of results, found by the same rules in every file."""

from benchmarks.add_on_tables import growth_of
from benchmarks.add_ons import ADD_ONS
from benchmarks.bars import (
    MAX_MEMORY_SLOPE,
    MAX_TIME_SLOPE,
    MISSED,
    NOT_MEASURED,
    SWEEPS,
    bars,
    here,
    slope_of,
)
from benchmarks.results import Results, Row, Spread
from benchmarks.suites import add_ons
from benchmarks.suites.linear_vs_quadratic import SUITE, num_patches

# interquartile range over median
NOISY = 0.25
SHOWN = 5


def weak_spots(results: Results) -> list[str]:
    """Return a line for everything that is missed, slower than it could be, wrong, failed or noisy."""
    return [
        *_bars(results),
        *_beaten(results),
        *_default_allocator(results),
        *_steep(results),
        *_without_number(results),
        *_noise(results),
    ]


def _bars(results: Results) -> list[str]:
    found = [f"Missed: {bar.claim}, {bar.measured} ({bar.limit})." for bar in bars(results) if bar.verdict == MISSED]
    unknown = [bar.claim for bar in bars(results) if bar.verdict == NOT_MEASURED]
    if unknown:
        found.append(f"Not measured, or not at enough sizes: {'; '.join(unknown)}.")
    return found


def _beaten(results: Results) -> list[str]:
    """Name whatever is faster than SSync, with the sizes where it is."""
    first, faster = here(results)[0].name, dict[str, list[str]]()
    for row in results.select(suite=SUITE, measure="time"):
        if row.status == "measured" and row.number("ratio") < 1 and row.id.contender != first:
            where = f"{num_patches(row.id.sizes):,} ({row.id.case.replace('*', '·')}, {row.number('ratio'):.2f}x)"
            faster.setdefault(row.id.contender, []).append(where)
    return [f"{name} takes less time than {first} at {', '.join(at)} patches." for name, at in faster.items()]


def _default_allocator(results: Results) -> list[str]:
    found = []
    for sweep in SWEEPS:
        for contender in here(results):
            slope = slope_of(results, sweep, contender, "time, default allocator")
            if slope is not None and slope.exponent > MAX_TIME_SLOPE:
                found.append(
                    f"With malloc as it comes, the slope of {contender.name} in {sweep.replace('*', '·')} is "
                    f"{slope.exponent:.2f}: page faults."
                )
    return found


def _steep(results: Results) -> list[str]:
    """Name the add-ons that grow faster than they should."""
    found = []
    for one in ADD_ONS:
        for measure, power, limit in (("time", one.time, MAX_TIME_SLOPE), ("memory", one.memory, MAX_MEMORY_SLOPE)):
            slope = growth_of(results, one.axis, one.name, measure)
            # as far above its exponent as SSync may be above 1
            if slope is not None and slope.enough and slope.exponent > power + limit - 1:
                found.append(
                    f"{one.name}: the slope of {measure} in {one.axis.replace('*', '·')} is {slope.exponent:.2f} from "
                    f"{slope.first:,} to {slope.last:,}, and should be {power}."
                )
    return found


def _without_number(results: Results) -> list[str]:
    rows = [row for row in results.rows.values() if row.status in ("failed", "wrong")]
    notes = dict.fromkeys((row.id.contender, row.status, row.note) for row in rows)
    return [f"{name} is {status}: {note}." for name, status, note in notes]


def _noise(results: Results) -> list[str]:
    timed = [(_noise_of(row), row) for row in results.rows.values() if "step" in row.values]
    noisy = sorted((one for one in timed if one[0] > NOISY), key=lambda one: -one[0])
    if not noisy:
        return []
    worst = "; ".join(f"{_short(row)} ({noise:.0%})" for noise, row in noisy[:SHOWN])
    return [
        f"{len(noisy)} of {len(timed)} timed rows have an interquartile range above {NOISY:.0%} of their median; "
        f"the widest: {worst}."
    ]


def _noise_of(row: Row) -> float:
    value = row.values["step"]
    return value.noise if isinstance(value, Spread) else 0.0


def _short(row: Row) -> str:
    one = row.id
    where = f"{num_patches(one.sizes):,} patches"
    if one.suite == add_ons.SUITE:
        where = f"{add_ons.size_of(one.case, one.sizes):,} {add_ons.GROWTH.unit(one.case)}"
    return f"{one.case}, {one.contender}, {where}"
