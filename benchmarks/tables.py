"""The results of a machine as Markdown."""

from collections.abc import Callable, Sequence

from examples.markdown import significant

from benchmarks.add_on_tables import add_on_parts
from benchmarks.add_ons import BY_NAME
from benchmarks.bars import SWEEPS, bars, fit_from, here, slope_of
from benchmarks.cells import details, markdown_table, memory_cell, shown, stops, time_cell
from benchmarks.contenders import DENSE, DENSE_CHUNKED, DENSE_WINDOWS, Contender
from benchmarks.results import Results, Row, RowId
from benchmarks.slopes import Slope
from benchmarks.suites import add_ons, kernels, training_step
from benchmarks.suites import linear_vs_quadratic as growth
from benchmarks.weak_spots import weak_spots


def section(results: Results, name: str, figure: str) -> str:
    """Lay out everything that is to be said about a file of results."""
    contenders = [*here(results), DENSE, DENSE_CHUNKED, *DENSE_WINDOWS]
    parts = [
        f"## Results: {name}",
        _caption(results),
        _gate(results),
    ]
    parts += [
        "### What must be shown",
        markdown_table(["", "limit", "measured", ""], [list(bar) for bar in bars(results)]),
    ]
    if results.select(suite=growth.SUITE):
        parts += [
            "### Linear against quadratic",
            f"![Time and memory of a step, and their slopes]({figure})",
            _growth_note(results),
            "Time of a step, forward and backward to all gradients, ms; in brackets how many times that of "
            f"{contenders[0].name}:",
            _growth(results, "H*W", contenders, time_cell),
            "Memory of a step beyond its inputs, MB allocated; in brackets as before:",
            _growth(results, "H*W", contenders, memory_cell),
            "Slopes: the exponent p of a fit ~ patches^p, in brackets over all sizes.",
            _slopes(results, contenders),
            *(details(f"All rows in {shown(one)}", _all_rows(results, one, contenders)) for one in SWEEPS),
            *stops(results, growth.GROWTH),
        ]
    if results.select(suite=training_step.SUITE):
        parts += ["### Share of a training step", TRAINING_NOTE, _training(results)]
    if results.select(suite=kernels.SUITE):
        parts += ["### Operations", _kernels_note(results), _kernels(results)]
    if results.select(suite=add_ons.SUITE):
        parts += ["### Add-ons", *add_on_parts(results)]
    spots = weak_spots(results)
    parts += ["### Weak spots", "\n".join(f"- {one}" for one in spots) if spots else "None by the rules of this page."]
    return "\n\n".join(parts)


TRAINING_NOTE = (
    "A step is forward, backward, clipping and Adam, on precomputed features: with a backbone in it the share would "
    "be smaller. The headline is the loss *alone*, forward and backward on the maps of such a step, over a step "
    "with it; the *difference* of steps with and without it, taken in turn, is printed beside it, but a share this "
    "small drowns in the noise of the rest."
)


def _caption(results: Results) -> str:
    one, settings = results.environment, results.settings
    where = f"{one['gpu']}, CUDA {one['cuda']}, " if one["gpu"] else ""
    threads = "1 thread" if settings["threads"] == 1 else f"{settings['threads']} threads"
    triton = f", triton {one['triton']}" if one["triton"] else ""
    dirty = " with uncommitted changes" if one["dirty"] else ""
    lines = [
        f"{where}{one['cpu']}, {one['cores']} cores, {one['memory_gb']} GB, {threads}; {one['system']}; "
        f"Python {one['python']}, torch {one['torch']}{triton}; commit {one['commit']}{dirty}, "
        f"sources {one['sources']}, {one['date']}."
    ]
    if settings["allocator"]:
        raised = " ".join(f"{name}={value}" for name, value in settings["allocator"].items())
        lines.append(
            f"What grows is timed in processes with `{raised}`; all else, and memory, in processes with malloc as it "
            "comes."
        )
    lines.append(
        f"A step that should take more than {settings['time_cap']:g} s or {settings['memory_cap'] / 1e9:.3g} GB, going "
        "by smaller ones, is not run: `time` and `memory` in place of a number."
    )
    if settings["quick"]:
        lines.append("**A rehearsal (`--quick`): few sizes, few repeats, short clips. Its numbers mean little.**")
    return "\n".join(lines)


def _gate(results: Results) -> str:
    rows = results.select(suite="gate")
    measured = dict.fromkeys(row.id.contender for row in rows if row.status == "measured")
    agree = [name for name in measured if name not in BY_NAME]
    # their names are in a table of their own
    num_add_ons = sum(name in BY_NAME for name in measured)
    if num_add_ons:
        agree.append(f"{num_add_ons} rows of add-ons")
    others = [f"{row.id.contender} ({row.status}: {row.note})" for row in rows if row.status != "measured"]
    said = f"Compared with the slow definitions first: {', '.join(agree) or 'none'} agree."
    return f"{said} Without numbers: {', '.join(others)}." if others else said


def _growth_note(results: Results) -> str:
    starts = {one.name: fit_from(results, one) for one in (*here(results), DENSE)}
    fits = ", ".join(f"{name} from {start:,} patches on" for name, start in starts.items())
    return (
        "H·W: one clip of 16 frames; T: one clip of 16x16 patches; B: clips of 4 frames of 16x16 patches; "
        f"{growth.NUM_SLOTS} slots, {growth.DTYPE}. Dense alignment has both terms, features of 64 numbers, one "
        "window over the clip unless windows of 2 or 4 frames are named, and labels for free; chunked, it holds "
        f"1,024 rows of scores at once. Fits: {fits}; smaller sizes measure the calling."
    )


Cell = Callable[[Results, Row], str]


def _growth(results: Results, sweep: str, contenders: Sequence[Contender], cell: Cell) -> str:
    measure = "memory" if cell is memory_cell else "time"
    rows = results.select(suite=growth.SUITE, case=sweep, measure=measure)
    names = [one.name for one in contenders if any(row.id.contender == one.name for row in rows)]
    table = []
    for size in sorted({growth.num_patches(row.id.sizes) for row in rows}):
        by_name = {row.id.contender: row for row in rows if growth.num_patches(row.id.sizes) == size}
        table.append([f"{size:,}", *(cell(results, by_name[name]) if name in by_name else "" for name in names)])
    return markdown_table(["patches", *names], table)


def _slopes(results: Results, contenders: Sequence[Contender]) -> str:
    head = ["", "in", "sizes", "time", "memory", "time, malloc as it comes"]
    table = []
    for contender in contenders:
        for sweep in SWEEPS:
            fitted = [
                (slope_of(results, sweep, contender, measure), slope_of(results, sweep, contender, measure, whole=True))
                for measure in ("time", "memory", "time, default allocator")
            ]
            if fitted[0][1] is None:
                continue
            used = fitted[0][0]
            sizes = f"{used.num_sizes}: {used.first:,} to {used.last:,}" if used else "-"
            table.append([contender.name, shown(sweep), sizes, *(_slope_cell(*one) for one in fitted)])
    return markdown_table(head, table)


def _slope_cell(fitted: Slope | None, whole: Slope | None) -> str:
    if whole is None:
        return ""
    return f"{fitted.exponent:.2f} ({whole.exponent:.2f})" if fitted else f"- ({whole.exponent:.2f})"


def _all_rows(results: Results, sweep: str, contenders: Sequence[Contender]) -> str:
    order = {one.name: place for place, one in enumerate(contenders)}
    rows = results.select(suite=growth.SUITE, case=sweep, measure="time")
    rows.sort(key=lambda row: (growth.num_patches(row.id.sizes), order.get(row.id.contender, len(order))))
    head = ["patches", "", "forward ms", "backward ms", "both ms", "IQR", "allocated MB", "resident MB", "loss"]
    table = []
    for row in rows:
        one = row.id
        cells = [row.status, row.status, row.status, ""]
        if row.status == "measured":
            times = [significant(1e3 * row.number(part)) for part in ("forward", "backward", "step")]
            cells = [*times, f"{row.spread('step').noise:.0%}"]
        memory = results.rows.get(RowId(one.suite, one.case, one.contender, "memory", one.shape, one.dtype))
        cells += ["", "", ""] if memory is None else _memory_cells(memory)
        table.append([f"{growth.num_patches(one.sizes):,}", one.contender, *cells])
    return markdown_table(head, table)


def _memory_cells(row: Row) -> list[str]:
    if row.status != "measured":
        return [row.status, "", ""]
    resident = significant(row.number("resident") / 1e6) if "resident" in row.values else ""
    return [significant(row.number("allocated") / 1e6), resident, f"{row.number('loss'):.6g}"]


def _training(results: Results) -> str:
    head = ["", "", "clips of the step", "step without, ms", "with, ms", "loss alone, ms", "share", "difference"]
    table = []
    for row in results.select(suite=training_step.SUITE):
        one = row.id.sizes
        shape = f"{row.id.case}, T={one['T']}, S={one['S']}, {one['H']}x{one['W']}"
        cells = [row.status, row.note, *[""] * 4]
        if row.status == "measured":
            difference = row.spread("difference")
            clips = f"{row.number('batch'):.0f}" + (f" of {one['B']}" if row.number("batch") < one["B"] else "")
            cells = [
                clips,
                *(significant(1e3 * row.number(part)) for part in ("without", "with", "alone")),
                f"**{row.number('share'):.2%}**",
                f"{difference.median:+.2%} ({difference.q1:+.2%} to {difference.q3:+.2%})",
            ]
        table.append([shape, row.id.contender, *cells])
    return markdown_table(head, table)


def _kernels_note(results: Results) -> str:
    copies = [row for row in results.select(suite=kernels.SUITE, case=kernels.COPY) if row.status == "measured"]
    speeds = [row.number("bandwidth") / 1e9 for row in copies]
    speed = f"{min(speeds):.0f} to {max(speeds):.0f} GB/s" if speeds else "not measured"
    unit = "launches on the GPU" if results.environment["device"] == "cuda" else "operators dispatched"
    return (
        "One thread, or two where they are named. *Floor*: times what the bytes of the operation, inputs read and "
        f"outputs written once, take at the speed of a copy of {kernels.COPY_BYTES >> 20} MB in the same run "
        f"({speed}); for a whole step {kernels.STEP_PASSES} passes over a map. Small maps lie in caches, so a floor is "
        "no bound for them. *Exp*: times `torch.exp(out=...)` over both maps, in the same run. "
        f"*Launches*: {unit}; *reads*: of data by the host. *Maps*: memory beyond inputs and both gradients, in maps, "
        "at the peak; *waiting*: between forward and backward, below 0 where the forward does not make the gradients. "
        "*First use*: in a new process with an empty cache of libraries, from importing the package to both gradients."
    )


def _kernels(results: Results) -> str:
    times, held = ["ms", "IQR", "backward ms", "floor", "exp"], ["launches", "reads", "maps", "waiting"]
    table = []
    for row in results.select(suite=kernels.SUITE, measure="time"):
        one = row.id
        if one.case == kernels.COPY:
            continue
        shape = "x".join(str(size) for _, size in one.shape)
        others = [
            results.rows.get(RowId(one.suite, one.case, one.contender, measure, one.shape, one.dtype))
            for measure in ("counts", "memory")
        ]
        cells = [row.status, *[""] * 4]
        if row.status == "measured":
            cells = [
                significant(1e3 * row.number("step")),
                f"{row.spread('step').noise:.0%}",
                significant(1e3 * row.number("backward")) if "backward" in row.values else "",
                f"{significant(row.number('over_floor'))}x" if "over_floor" in row.values else "",
                f"{row.number('over_exp'):.2f}x" if "over_exp" in row.values else "",
            ]
        counts, memory = (other if other is not None and other.status == "measured" else None for other in others)
        cells += [f"{counts.number(key):.0f}" if counts else "" for key in ("launches", "host_reads")]
        for key in ("maps_beyond_gradients", "maps_waiting"):
            cells.append(f"{memory.number(key):.2f}" if memory and key in memory.values else "")
        table.append([shape, one.dtype, one.case, one.contender, *cells])
    return markdown_table(["BxTxSxHxW", "", "", "", *times, *held], table)
