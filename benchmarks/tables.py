"""The results of a machine as Markdown: what must be shown, growth, steps and add-ons."""

import math

from examples.machine import machine_line
from examples.markdown import markdown, number, significant

from benchmarks.add_ons import ADD_ONS, BY_NAME, CHANNELS, DENSE, Entry
from benchmarks.bars import FIT_FROM, MAX_MEMORY_SLOPE, MAX_TIME_SLOPE, SWEEPS, bars, here, slope_of, verdict
from benchmarks.contenders import STEP, USUAL_MALLOC
from benchmarks.results import Key, Results, Row, Spread
from benchmarks.suites import growth, kernels, training_step

# of all sizes, and the last
SHOWN_EVERY = 4
# interquartile range over median
NOISY = 0.25
POWERS = {0: "constant", 1: "linear", 2: "quadratic"}
LEAST_RATIO = 0.01
# left to --rows unless it is too steep: another form of what is shown, or next to nothing
UNSHOWN = (
    "a scan of some step",
    "dense in windows of 4",
    "StructureAwareLoss, kornia's filters",
    "SemanticConsistencyLoss, all pairs at once",
    "SemanticConsistencyLoss, pooled 2x2",
    "AffinityConsistencyLoss, 128 rows at once",
    "InstanceConsistencyLoss, P=8, scipy",
    "SlotCurriculum, elsewhere",
    "valid_instances",
    "clip_mask",
)
VALUES = ("step", "allocated")


def section(results: Results, name: str, figure: str) -> str:
    """Lay out what is to be said about a file of results; all rows are in the file."""
    found = bars(results)
    parts = [f"## Results: {name}", "\n".join(_caption(results)), "### What must be shown", verdict(found)]
    parts.append(table([["", "limit", "measured"], *(list(bar[:3]) for bar in found)]))
    if results.select(growth.LINEAR):
        parts += ["### Linear against quadratic", f"![Time and memory of a step, and their slopes]({figure})"]
        parts += [_growth_note(results), table(_growth(results))]
    if results.select(kernels.SUITE):
        parts += ["### Steps", _steps_note(results), table(_steps(results))]
    if results.select(growth.NEIGHBORS):
        parts += ["### Add-ons", _add_ons_note(results), table(_add_ons(results))]
    return "\n\n".join(parts)


def table(rows: list[list[str]]) -> str:
    """Lay out a table."""
    return "\n".join(markdown(rows))


def _caption(results: Results) -> list[str]:
    settings = results.settings
    lines = [machine_line(results.machine)]
    if settings["malloc"]:
        raised = " ".join(f"{name}={value}" for name, value in settings["malloc"].items())
        lines.append(f"What grows is timed with `{raised}`; all else, and memory, with malloc as it comes.")
    lines.append(
        f"What should take more than {settings['time_cap']:g} s or {settings['memory_cap'] / 1e9:.3g} GB is not run, "
        "but says `time` or `memory`."
    )
    if settings["quick"]:
        lines.append("**A rehearsal (`--quick`): few sizes, few repeats, short clips. Its numbers mean little.**")
    agree = dict.fromkeys(row.key.contender for row in results.select("gate") if row.status == "measured")
    ssync = [name for name in agree if name not in BY_NAME]
    others = len(agree) - len(ssync)
    lines.append(f"Agree with the slow definitions: {', '.join(ssync) or 'none'}, {others} others.")
    stopped = [row for row in results.rows.values() if row.status in ("failed", "wrong")]
    lines += dict.fromkeys(
        f"**{row.key.contender} is {row.status}**: {row.note.rpartition('Error: ')[2]}" for row in stopped
    )
    timed = [row.values["step"] for row in results.rows.values() if "step" in row.values]
    noisy = sum(isinstance(one, Spread) and one.q3 - one.q1 > NOISY * one.median for one in timed)
    lines.append(f"{noisy} of {len(timed)} timed rows have an interquartile range above {NOISY:.0%}.")
    return lines


def _growth_note(results: Results) -> str:
    starts = FIT_FROM[results.machine["device"]]
    return (
        f"ms, MB and times SSync of a step in H·W, {growth.SLOTS} slots. Dense alignment has both terms, {CHANNELS} "
        "channels and labels for free; chunked, it holds 1,024 rows of scores. Slopes, in H·W, T and B, are exponents "
        f"from {starts['SSync']:,} patches on, dense from {starts['dense']:,}: below, calling takes the time."
    )


def _growth(results: Results) -> list[list[str]]:
    rows = {(row.key.contender, growth.size_of(row.key)): row for row in results.select(growth.LINEAR, case="H*W")}
    sizes = sorted({size for _, size in rows})[SHOWN_EVERY::SHOWN_EVERY]
    lines = [["patches", *(f"{size:,}" for size in sizes), "slopes of time", "slopes of memory"]]
    for name in (
        *here(results),
        here(results)[0] + USUAL_MALLOC,
        *(one.name for one in DENSE if one.name not in UNSHOWN),
    ):
        slopes = [", ".join(_slope(slope_of(results, sweep, name, value)) for sweep in SWEEPS) for value in VALUES]
        lines.append([name, *(_both(rows.get((name, size))) for size in sizes), *slopes])
    return [line for line in lines if any(line[1:])]


def _slope(slope: float | None, limit: float = math.inf) -> str:
    said = "-" if slope is None else number(slope, 2)
    return said if slope is None or slope <= limit else f"**{said}**"


def _both(row: Row | None) -> str:
    """Write milliseconds, megabytes, and in brackets how many times SSync's time that is."""
    if row is None:
        return ""
    if "step" not in row.values:
        return row.status
    said = [significant(1e3 * row.number("step"))]
    if "allocated" in row.values:
        said.append(significant(row.number("allocated") / 1e6))
    ratio = row.number("ratio") if "ratio" in row.values else 1.0
    return ", ".join(said) + (f" ({times(ratio)})" if ratio != 1.0 else "")


def times(ratio: float) -> str:
    """Write a ratio."""
    return f"{significant(ratio)}x" if ratio >= LEAST_RATIO else f"<{LEAST_RATIO}x"


def _steps_note(results: Results) -> str:
    unit = "launches on the GPU" if results.machine["device"] == "cuda" else "operators dispatched"
    note = (
        f"SSync, mean squared error. In brackets: times `torch.exp(out=...)` over both maps. *Launches*: {unit}. "
        "*Maps*: memory beyond inputs and gradients, in maps, at the peak, and between forward and backward."
    )
    for row in results.select(training_step.SUITE, case=training_step.EXAMPLE, contender="SSync torch"):
        if "share" in row.values:
            note += f" Plain torch takes {row.number('share'):.2%} of the example's training step."
    return note


def _steps(results: Results) -> list[list[str]]:
    lines = [["BxTxSxHxW, dtype", "", "ms", "launches", "maps"]]
    shown = [row for row in results.select(kernels.SUITE, case=STEP) if row.key.sizes["S"] == kernels.MOVI_C["S"]]
    for row in shown:
        shape = "x".join(str(size) for size in row.key.sizes.values())
        if row.key.dtype != "float32":
            shape += f", {row.key.dtype}"
        cells = [row.status, f"{row.number('launches'):.0f}" if "launches" in row.values else ""]
        if "step" in row.values:
            cells[0] = f"{significant(1e3 * row.number('step'))} ({row.number('over_exp'):.2f}x)"
        maps = [row.number(name) for name in ("maps_beyond_gradients", "maps_waiting") if name in row.values]
        lines.append([shape, row.key.contender, *cells, ", ".join(f"{one:.2f}" for one in maps)])
    return lines


def _add_ons_note(results: Results) -> str:
    one = growth.REFERENCE
    return (
        f"{one['B']} clips of {one['T']} frames of {one['H']}x{one['W']} patches, {one['D']} channels, {one['S']} "
        f"slots, {one['Kp']:,} prototypes, 10 tokens, {one['weights'] / 1e6:.1f} million weights. In brackets: times "
        f"{here(results)[0]}. Slopes of time and memory, of the {growth.MIN_SIZES} largest sizes, are in patches of a "
        "frame unless an axis is named; bold is too steep."
    )


def _add_ons(results: Results) -> list[list[str]]:
    lines = [["", "ms, MB", "slopes"]]
    for one in ADD_ONS:
        slopes = []
        for value, power, excess in (("step", one.time, MAX_TIME_SLOPE), ("allocated", one.memory, MAX_MEMORY_SLOPE)):
            known = growth.history(results, growth.NEIGHBORS, one.axis, one.name, value)
            # nothing has no logarithm; smaller sizes measure the calling
            known = [point for point in known if point[1] > 0][-growth.MIN_SIZES :]
            slopes.append(_slope(growth.slope(known), power + excess - 1))
        said = ", ".join(slopes) + ("" if one.axis == "H*W" else f" in {one.axis}")
        row = at_reference(results, one)
        if row is not None and (one.name not in UNSHOWN or "**" in said):
            lines.append([one.name, _both(row), said])
    return lines


def at_reference(results: Results, one: Entry) -> Row | None:
    """Return the row of the shape that all sweeps go through."""
    return results.rows.get(Key(growth.NEIGHBORS, one.axis, one.name, tuple(growth.REFERENCE.items())))


def in_short(results: Results) -> dict[str, str]:
    """Say what each add-on costs as the README does, such as ``"0.12x, linear"``: how it grows with patches."""
    found = {}
    for one in ADD_ONS:
        row = at_reference(results, one)
        if row is not None and "ratio" in row.values:
            found[one.name] = f"{times(row.number('ratio'))}, {POWERS[one.time if one.axis == 'H*W' else 0]}"
    return found


def every_row(results: Results, suite: str) -> str:
    """Lay out all rows of a suite with all that they hold: medians of what was sampled, seconds and bytes."""
    rows = results.select(suite)
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    lines = [["case", "contender", "shape", "dtype", *names, "status"]]
    for row in rows:
        shape = " ".join(f"{axis}={size}" for axis, size in row.key.shape)
        values = [f"{row.number(name):.6g}" if name in row.values else "" for name in names]
        lines.append([row.key.case, row.key.contender, shape, row.key.dtype, *values, row.note or row.status])
    return table(lines)
