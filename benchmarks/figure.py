"""Both curves in one picture: time and memory of a step as a clip, or a batch, grows."""

from pathlib import Path

from examples.files import written_whole
from matplotlib.figure import Figure

from benchmarks.add_ons import DENSE
from benchmarks.bars import SWEEPS, here, slope_of
from benchmarks.results import Results
from benchmarks.suites.growth import LINEAR, history

TITLES = ("H·W: one clip of 16 frames", "T: one clip of 16x16 patches", "B: clips of 4x16x16 patches")
# of SSync, then of dense alignment
LINES = ("-o", "--o", "-^", "--v", "-D", "-s", "-x")
MEASURES = (("step", 1e3, "ms a step", "time_cap"), ("allocated", 1e-6, "MB beyond the inputs", "memory_cap"))


def save_figure(results: Results, path: Path) -> None:
    """Draw time above memory, a column for every sweep, with fitted slopes."""
    figure = Figure(figsize=(13.5, 8.4), layout="constrained", facecolor="white")
    grid = figure.subplots(2, len(SWEEPS), sharex="col", sharey="row")
    for axes, (value, unit, label, cap) in zip(grid, MEASURES, strict=True):
        axes[0].set_ylabel(label)
        for axis, sweep in zip(axes, SWEEPS, strict=True):
            contenders = *here(results), *(one.name for one in DENSE)
            for contender, line in zip(contenders, LINES, strict=False):
                points = history(results, LINEAR, sweep, contender, value)
                slope = slope_of(results, sweep, contender, value)
                sizes, costs = [size for size, _ in points], [unit * cost for _, cost in points]
                name = contender if slope is None else f"{contender}: slope {slope:.2f}"
                axis.plot(sizes, costs, line, markersize=4.5, linewidth=1.8, label=name if points else None)
            axis.axhline(unit * results.origin[cap], color="#b0b0b0", linestyle=":", label="cap of a step")
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.grid(visible=True, which="major", color="#e4e4e4", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(loc="lower right", frameon=False, fontsize="small")
        # room for the legends below the curves
        low, high = axes[0].get_ylim()
        axes[0].set_ylim(low / (high / low) ** 0.6, high)
    for (above, below), title in zip(grid.T, TITLES, strict=True):
        above.set_title(title, fontsize="medium")
        below.set_xlabel("patches")
    where = results.origin["gpu"] or results.origin["cpu"]
    figure.suptitle(f"A step of SSync and of dense alignment on {where}; slopes fitted as in the tables")
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
