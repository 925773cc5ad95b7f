"""Both curves in one picture: time and memory of a step as a clip, or a batch, grows."""

from pathlib import Path
from typing import Literal

from examples.files import written_whole
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.add_ons import DENSE
from benchmarks.bars import SWEEPS, here, slope_of
from benchmarks.results import Results
from benchmarks.suites.growth import LINEAR, history

TITLES = {"H*W": "H·W: one clip of 16 frames", "T": "T: one clip of 16x16 patches", "B": "B: clips of 4x16x16 patches"}
# color, line, marker
STYLES: dict[str, tuple[str, Literal["-", "--"], str]] = {
    "SSync cpu": ("#1f6fd1", "-", "o"),
    "SSync triton": ("#0f8f6a", "-", "o"),
    "SSync torch": ("#7d4fc4", "--", "s"),
    "dense": ("#c8322b", "-", "^"),
    "dense chunked": ("#e08a00", "--", "v"),
    "dense in windows of 2": ("#8e8e8e", "-", "D"),
    "dense in windows of 4": ("#4f4f4f", "-", "D"),
}
MEASURES = (("time", "step", 1e3, "ms a step"), ("memory", "allocated", 1e-6, "MB beyond the inputs"))


def save_figure(results: Results, path: Path) -> None:
    """Draw time above memory, a column for every sweep, with fitted slopes."""
    figure = Figure(figsize=(13.5, 8.4), layout="constrained", facecolor="white")
    grid = figure.subplots(2, len(SWEEPS), sharex="col", sharey="row")
    contenders = [*here(results), *DENSE]
    for axes, (measure, value, unit, label) in zip(grid, MEASURES, strict=True):
        for axis, sweep in zip(axes, SWEEPS, strict=True):
            for contender in contenders:
                points = history(results, LINEAR, sweep, contender, value)
                color, line, marker = STYLES[contender]
                sizes, costs = [size for size, _ in points], [unit * cost for _, cost in points]
                axis.plot(sizes, costs, line, color=color, marker=marker, markersize=4.5, linewidth=1.8)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.grid(visible=True, which="major", color="#e4e4e4", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        cap = unit * results.settings["time_cap" if measure == "time" else "memory_cap"]
        for axis in axes:
            axis.axhline(cap, color="#b0b0b0", linestyle=":", linewidth=1.4)
        axes[-1].text(
            0.98,
            cap * 0.88,
            "cap of a step",
            ha="right",
            va="top",
            color="#808080",
            fontsize="small",
            transform=axes[-1].get_yaxis_transform(),
        )
        axes[0].set_ylabel(label)
        # room for the slopes below the curves
        low, high = axes[0].get_ylim()
        axes[0].set_ylim(low / (high / low) ** 0.35, high)
        for axis, sweep in zip(axes, SWEEPS, strict=True):
            _write_slopes(axis, results, sweep, contenders, value)
    for axis, sweep in zip(grid[0], SWEEPS, strict=True):
        axis.set_title(TITLES[sweep], fontsize="medium")
    for axis in grid[1]:
        axis.set_xlabel("patches")
    shown = [one for one in contenders if any(history(results, LINEAR, sweep, one, "step") for sweep in SWEEPS)]
    handles = [Line2D([], [], color=c, linestyle=ls, marker=m) for c, ls, m in (STYLES[one] for one in shown)]
    figure.legend(handles, shown, loc="outside lower center", ncols=len(shown), frameon=False)
    where = results.machine["gpu"] or results.machine["cpu"]
    figure.suptitle(f"A step of SSync and of dense alignment on {where}; slopes fitted as in the tables")
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def _write_slopes(axis: Axes, results: Results, sweep: str, contenders: list[str], value: str) -> None:
    """List the slopes in the corner below the curves, from the bottom up."""
    height = 0.02
    for contender in reversed(contenders):
        slope = slope_of(results, sweep, contender, value)
        if slope is None or not slope.enough:
            continue
        text = f"{contender}: slope {slope.exponent:.2f}"
        color = STYLES[contender][0]
        axis.text(0.98, height, text, color=color, fontsize="small", ha="right", transform=axis.transAxes)
        height += 0.052
