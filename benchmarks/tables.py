"""The results of a machine as Markdown: the bars, growth, steps and add-ons."""

import math

from examples.machine import machine_line
from examples.markdown import markdown, number, significant

from benchmarks.add_ons import ADD_ONS, BY_NAME, CHANNELS, DENSE, Entry
from benchmarks.bars import FIT_FROM, MAX_MEMORY_SLOPE, MAX_TIME_SLOPE, MET, SWEEPS, bars, here, slope_of, summary
from benchmarks.contenders import EXP, STEP, TORCH, USUAL_MALLOC
from benchmarks.results import Key, Results, Row, Spread
from benchmarks.suites import growth, kernels, training_step

# every fourth size of a sweep
SHOWN_EVERY = 4
# interquartile range over median
NOISY = 0.25
LEAST_RATIO = 0.01


def section(results: Results, name: str, figure: str) -> str:
    """Write the section of a file of results."""
    found = bars(results)
    parts = [f"## Results: {name}", *_caption(results), "### What must be shown", summary(found)]
    rows = [[bar.claim, bar.limit + f": {bar.verdict}" * (bar.verdict != MET), bar.measured] for bar in found]
    parts.append(table([["", "limit", "measured"], *rows]))
    if results.select(growth.LINEAR):
        parts += ["### Linear against quadratic", f"![Time and memory of a step, and their slopes]({figure})"]
        parts += _growth(results)
    if results.select(kernels.SUITE):
        parts += ["### Steps", *_steps(results)]
    if results.select(growth.NEIGHBORS):
        parts += ["### Add-ons", *_add_ons(results)]
    return "\n\n".join(parts)


def table(rows: list[list[str]]) -> str:
    """Write a table."""
    return "\n".join(markdown(rows))


def _caption(results: Results) -> list[str]:
    settings, rows = results.origin, list(results.rows.values())
    parts = [machine_line(results.origin)]
    if settings["quick"]:
        parts.append("**A rehearsal (`--quick`): few sizes, few repeats, short clips. Its numbers mean little.**")
    if settings["malloc"]:
        raised = " ".join(f"{name}={value}" for name, value in settings["malloc"].items())
        parts.append(
            f"Growing sizes run with `{raised}`, unless malloc is named. All else runs with malloc as it comes."
        )
    caps = f"{settings['time_cap']:g} s or {settings['memory_cap'] / 1e9:.3g} GB"
    least = growth.LONGEST_STEP[growth.NEIGHBORS]
    parts.append(f"A step that should take more than {caps}, an add-on {least:g} s, says `time` or `memory`.")
    agree = dict.fromkeys(row.key.contender for row in results.select("gate") if row.status == "measured")
    ssync = [name for name in agree if name not in BY_NAME]
    others = len(agree) - len(ssync)
    parts.append(f"These agree with the slow definitions: {', '.join(ssync) or 'none'}, {others} others.")
    parts += dict.fromkeys(
        f"**{row.key.contender} {row.status.replace('wrong', 'is wrong')}**: {row.note.rpartition('Error: ')[2]}"
        for row in rows
        if row.status in ("failed", "wrong")
    )
    timed = [row.values["step"] for row in rows if "step" in row.values]
    noisy = sum(isinstance(one, Spread) and one.q3 - one.q1 > NOISY * one.median for one in timed)
    parts.append(f"The interquartile range is above {NOISY:.0%} in {noisy} of {len(timed)} timed rows.")
    return ["\n".join(parts)]


def _growth(results: Results) -> list[str]:
    starts = FIT_FROM[results.origin["device"]]
    note = (
        f"A cell has ms, MB and times SSync of a step in H·W, {growth.SLOTS} slots. Dense alignment has both terms, "
        f"{CHANNELS} channels and free labels. In chunks it holds 1,024 rows of scores. Slopes in H·W, T and B are "
        f"exponents from {starts['SSync']:,} patches on, dense from {starts['dense']:,}. Below, calls lower slopes. "
        "With malloc as it comes, SSync runs alone."
    )
    rows = {(row.key.contender, growth.size_of(row.key)): row for row in results.select(growth.LINEAR, case="H*W")}
    sizes = sorted({size for _, size in rows})[SHOWN_EVERY::SHOWN_EVERY]
    lines = [["patches", *(f"{size:,}" for size in sizes), "slopes of time", "slopes of memory"]]
    dense = [one.name for one in DENSE if one.shown]
    for name in (*here(results), here(results)[0] + USUAL_MALLOC, *dense):
        slopes = [
            ", ".join(_slope(slope_of(results, sweep, name, value)) for sweep in SWEEPS)
            for value in ("step", "allocated")
        ]
        cells = [_cost(rows.get((name, size))) for size in sizes]
        if any(cells):
            lines.append([name, *cells, *slopes])
    return [note, table(lines)]


def _slope(slope: float | None, limit: float = math.inf) -> str:
    said = "-" if slope is None else number(slope, 2)
    return said if slope is None or slope <= limit else f"**{said}**"


def _cost(row: Row | None) -> str:
    """Write milliseconds, megabytes, and times SSync."""
    if row is None or "step" not in row.values:
        return "" if row is None else row.status
    said = [significant(1e3 * row.number("step")), significant(row.number("allocated") / 1e6)]
    ratio = row.number("ratio") if "ratio" in row.values else 1.0
    return ", ".join(said) + (f" ({times(ratio)})" if ratio != 1.0 else "")


def times(ratio: float) -> str:
    """Write a ratio."""
    return f"{significant(ratio)}x" if ratio >= LEAST_RATIO else f"<{LEAST_RATIO}x"


def _steps(results: Results) -> list[str]:
    unit = (
        "launches on the GPU"
        if results.origin["device"] == "cuda"
        else "operators dispatched, a call of the C library as one"
    )
    note = (
        "SSync with mean squared error. In brackets: times `torch.exp(out=...)` over both maps on one thread. "
        f"*Launches* are {unit}. *Maps* are the memory beyond inputs and gradients, in maps, at the peak and between "
        "forward and backward."
    )
    for row in results.select(kernels.SUITE, case=STEP, contender="SSync cpu"):
        # a step that allocates nothing shows what the profiler takes
        idle = results.rows.get(row.key._replace(case=EXP, contender=TORCH), row)
        if row.key.sizes == {"B": kernels.BATCH, **kernels.MOVI_C} and "resident" in row.values.keys() & idle.values:
            own = row.number("resident") - row.number("allocated") - idle.number("resident")
            note += f" The C library holds {own / growth.size_of(row.key):.1f} bytes a patch beside torch's allocator."
    for row in results.select(training_step.SUITE, case=training_step.EXAMPLE, contender="SSync torch"):
        if "alone_over_with" in row.values:
            note += f" Plain torch takes {row.number('alone_over_with'):.2%} of the example's training step."
    lines = [["BxTxSxHxW, dtype", "", "ms", "launches", "maps"]]
    for row in results.select(kernels.SUITE, case=STEP):
        if row.key.sizes["S"] != kernels.MOVI_C["S"]:
            continue
        shape = "x".join(str(size) for size in row.key.sizes.values())
        shape += "" if row.key.dtype == "float32" else f", {row.key.dtype}"
        cells = [row.status, f"{row.number('launches'):.0f}" if "launches" in row.values else ""]
        if "step" in row.values:
            cells[0] = f"{significant(1e3 * row.number('step'))} ({row.number('over_exp'):.2f}x)"
        maps = [row.number(name) for name in ("maps_beyond_gradients", "maps_waiting") if name in row.values]
        lines.append([shape, row.key.contender, *cells, ", ".join(f"{one:.2f}" for one in maps)])
    return [note, table(lines)]


def _add_ons(results: Results) -> list[str]:
    size = growth.REFERENCE
    note = (
        f"{size['B']} clips of {size['T']} frames of {size['H']}x{size['W']} patches, {size['D']} channels, "
        f"{size['S']} slots, {size['Kp']:,} prototypes, 10 tokens, {size['weights'] / 1e6:.1f} million weights. In "
        f"brackets: times {here(results)[0]}. Slopes of time and memory are those of the {growth.MIN_SIZES} largest "
        "sizes, in patches of a frame unless an axis is named. Bold is too steep."
    )
    lines = [["", "ms, MB", "slopes"]]
    for one in ADD_ONS:
        slopes = []
        for value, power, most in (("step", one.time, MAX_TIME_SLOPE), ("allocated", one.memory, MAX_MEMORY_SLOPE)):
            known = growth.history(results, growth.NEIGHBORS, one.axis, one.name, value)
            # zero has no logarithm
            known = [point for point in known if point[1] > 0][-growth.MIN_SIZES :]
            slopes.append(_slope(growth.slope(known), power + most - 1))
        said = ", ".join(slopes) + ("" if one.axis == "H*W" else f" in {one.axis}")
        row = at_reference(results, one)
        if row is not None and (one.shown or "**" in said):
            lines.append([one.name, _cost(row), said])
    return [note, table(lines)]


def at_reference(results: Results, one: Entry) -> Row | None:
    """Return the row of the shape that all sweeps pass through."""
    return results.rows.get(Key(growth.NEIGHBORS, one.axis, one.name, tuple(growth.REFERENCE.items())))


def in_short(results: Results) -> dict[str, str]:
    """Return the cost of each add-on as in ``"0.12x, linear"``: times SSync, and its growth with the patches."""
    found = {}
    for one in ADD_ONS:
        row = at_reference(results, one)
        if row is not None and "ratio" in row.values:
            power = one.time if one.axis == "H*W" else 0
            found[one.name] = f"{times(row.number('ratio'))}, {('constant', 'linear', 'quadratic')[power]}"
    return found


def every_row(results: Results, suite: str) -> str:
    """Write all rows of a suite with all values: medians, seconds, bytes."""
    rows = results.select(suite)
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    lines = [["case", "contender", "shape", "dtype", *names, "status"]]
    for row in rows:
        shape = " ".join(f"{axis}={size}" for axis, size in row.key.shape)
        values = [f"{row.number(name):.6g}" if name in row.values else "" for name in names]
        lines.append([row.key.case, row.key.contender, shape, row.key.dtype, *values, row.note or row.status])
    return table(lines)
