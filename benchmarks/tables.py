"""The results of a machine as Markdown: bars, growth, steps, add-ons, and what does not look good."""

import re

from examples.machine import machine_line
from examples.markdown import markdown, number, significant

from benchmarks.add_on_tables import add_on_parts, growth_of, times
from benchmarks.add_ons import ADD_ONS, BY_NAME, CHANNELS, DENSE
from benchmarks.bars import (
    FIT_FROM,
    MAX_MEMORY_SLOPE,
    MAX_TIME_SLOPE,
    MISSED,
    NOT_MEASURED,
    SWEEPS,
    bars,
    here,
    slope_of,
)
from benchmarks.contenders import USUAL_MALLOC
from benchmarks.results import Results, Row, Spread
from benchmarks.suites import growth, kernels, training_step

# of all sizes, and the last
SHOWN_EVERY = 4
# interquartile range over median
NOISY = 0.25


def section(results: Results, name: str, figure: str) -> str:
    """Lay out what is to be said about a file of results; all rows are in the file."""
    parts = [f"## Results: {name}", _caption(results), _gate(results), "### What must be shown"]
    parts.append(_table([["", "limit", "measured", ""], *map(list, bars(results))]))
    if results.select(growth.LINEAR):
        parts += ["### Linear against quadratic", f"![Time and memory of a step, and their slopes]({figure})"]
        parts += [_growth_note(results), _growth(results)]
    if results.select(kernels.SUITE):
        parts += ["### Steps", _steps_note(results), _steps(results)]
    if results.select(growth.NEIGHBORS):
        parts += ["### Add-ons", *add_on_parts(results)]
    spots = weak_spots(results)
    parts += ["### Weak spots", "\n".join(f"- {one}" for one in spots) if spots else "None by the rules of this page."]
    return "\n\n".join(parts)


def _table(rows: list[list[str]]) -> str:
    return "\n".join(markdown(rows))


def _caption(results: Results) -> str:
    settings = results.settings
    lines = [machine_line(results.machine)]
    if settings["malloc"]:
        raised = " ".join(f"{name}={value}" for name, value in settings["malloc"].items())
        lines.append(f"What grows is timed with `{raised}`; all else, and memory, with malloc as it comes.")
    lines.append(
        f"A step that should take more than {settings['time_cap']:g} s or {settings['memory_cap'] / 1e9:.3g} GB, going "
        "by smaller ones, is not run: `time` and `memory` in place of a number."
    )
    if settings["quick"]:
        lines.append("**A rehearsal (`--quick`): few sizes, few repeats, short clips. Its numbers mean little.**")
    return "\n".join(lines)


def _gate(results: Results) -> str:
    rows = results.select("gate")
    agree = dict.fromkeys(row.key.contender for row in rows if row.status == "measured")
    others = [f"{row.key.contender} ({row.status}: {row.note})" for row in rows if row.status != "measured"]
    ssync = [name for name in agree if name not in BY_NAME]
    said = f"Agree with the slow definitions: {', '.join(ssync) or 'none'}, {len(agree) - len(ssync)} other rows."
    return f"{said} Without numbers: {', '.join(others)}." if others else said


def _growth_note(results: Results) -> str:
    starts = FIT_FROM[results.machine["device"]]
    return (
        "H·W: one clip of 16 frames; T: one clip of 16x16 patches; B: clips of 4 frames of 16x16 patches; "
        f"{growth.SLOTS} slots. Dense alignment has both terms, {CHANNELS} channels, one window over the clip "
        "unless windows are named, and labels for free; chunked, it holds 1,024 rows of scores at once. *ms, MB* of a "
        "step, forward and backward, in H·W; in brackets times SSync. *Slopes* of time and memory are exponents of "
        f"patches, from {starts['SSync']:,} on, dense from {starts['dense']:,} on; smaller sizes measure the calling."
    )


def _growth(results: Results) -> str:
    rows = {(growth.size_of(row.key), row.key.contender): row for row in results.select(growth.LINEAR, case="H*W")}
    names = [name for name in (*here(results), *DENSE) if any(one == name for _, one in rows)]
    sizes = sorted({size for size, _ in rows})
    table = [["patches", *names]]
    for size in sizes[::SHOWN_EVERY]:
        table.append([f"{size:,}", *(_both(rows.get((size, name))) for name in names)])
    for sweep in SWEEPS:
        slopes = [[slope_of(results, sweep, name, value) for value in ("step", "allocated")] for name in names]
        said = [", ".join(number(one.exponent, 2) if one and one.enough else "-" for one in pair) for pair in slopes]
        table.append([f"slopes in {sweep.replace('*', '·')}", *said])
    return _table(table)


def _both(row: Row | None) -> str:
    if row is None:
        return ""
    if "step" not in row.values:
        return row.status
    ratio = row.number("ratio") if "ratio" in row.values else 1.0
    said = f"{significant(1e3 * row.number('step'))}, {significant(row.number('allocated') / 1e6)}"
    return said if ratio == 1.0 else f"{said} ({times(ratio)})"


def _steps_note(results: Results) -> str:
    unit = "launches on the GPU" if results.machine["device"] == "cuda" else "operators dispatched"
    note = (
        "Forward and backward of SSync to both gradients, mean squared error. *Exp*: times `torch.exp(out=...)` over "
        f"both maps, in the same run. *Launches*: {unit}. *Maps*: memory beyond inputs and both gradients, in maps, at "
        "the peak; *waiting*: between forward and backward."
    )
    for row in results.select(training_step.SUITE, case=training_step.EXAMPLE, contender="SSync torch"):
        if "share" in row.values:
            note += f" Plain torch takes {row.number('share'):.2%} of the example's training step."
    return note


def _steps(results: Results) -> str:
    table = [["BxTxSxHxW", "", "", "ms", "exp", "launches", "maps", "waiting"]]
    for row in results.select(kernels.SUITE, case=kernels.STEP):
        shape = "x".join(str(size) for _, size in row.key.shape)
        cells = [row.status, ""]
        if "step" in row.values:
            cells = [significant(1e3 * row.number("step")), f"{row.number('over_exp'):.2f}x"]
        for value, form in (("launches", ".0f"), ("maps_beyond_gradients", ".2f"), ("maps_waiting", ".2f")):
            cells.append(f"{row.number(value):{form}}" if value in row.values else "")
        table.append([shape, row.key.dtype, row.key.contender, *cells])
    return _table(table)


def every_row(results: Results, suite: str) -> str:
    """Lay out all rows of a suite with all that they hold: medians of what was sampled, seconds and bytes."""
    rows = results.select(suite)
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    table = [["case", "contender", "shape", "dtype", *names, "status"]]
    for row in rows:
        shape = " ".join(f"{axis}={size}" for axis, size in row.key.shape)
        values = [f"{row.number(name):.6g}" if name in row.values else "" for name in names]
        table.append([row.key.case, row.key.contender, shape, row.key.dtype, *values, row.note or row.status])
    return _table(table)


def weak_spots(results: Results) -> list[str]:
    """Return a line for everything that is missed, slower than it could be, wrong, failed or noisy."""
    found = [f"Missed: {bar.claim}, {bar.measured} ({bar.limit})." for bar in bars(results) if bar.verdict == MISSED]
    unknown = [bar.claim for bar in bars(results) if bar.verdict == NOT_MEASURED]
    if unknown:
        found.append(f"Not measured, or not at enough sizes: {'; '.join(unknown)}.")
    first = here(results)[0]
    for row in results.select(growth.LINEAR):
        if "ratio" in row.values and row.number("ratio") < 1 and row.key.contender != first:
            found.append(f"{row.key.contender} is faster than {first} at {growth.size_of(row.key):,} patches.")
    usual = [slope_of(results, sweep, first + USUAL_MALLOC, "step") for sweep in SWEEPS]
    steep = [f"{one.exponent:.2f}" for one in usual if one is not None and one.exponent > MAX_TIME_SLOPE]
    if steep:
        found.append(f"With malloc as it comes, page faults bend slopes of {first}: {', '.join(steep)}.")
    for one in ADD_ONS:
        # as far above its exponent as SSync may be above 1
        for value, limit in (("step", one.time + MAX_TIME_SLOPE - 1), ("allocated", one.memory + MAX_MEMORY_SLOPE - 1)):
            slope = growth_of(results, one.axis, one.name, value)
            if slope is not None and slope.enough and slope.exponent > limit:
                found.append(f"{one.name}: the slope of `{value}` is {slope.exponent:.2f}.")
    stopped = [row for row in results.rows.values() if row.status in ("failed", "wrong")]
    reasons = [f"{row.key.contender} is {row.status}: {re.sub('^as at .*?: ', '', row.note)}" for row in stopped]
    found += dict.fromkeys(reasons)
    timed = [row.values["step"] for row in results.rows.values() if "step" in row.values]
    noisy = sum(isinstance(one, Spread) and one.noise > NOISY for one in timed)
    if noisy:
        found.append(f"{noisy} of {len(timed)} timed rows have an interquartile range above {NOISY:.0%}.")
    return found
