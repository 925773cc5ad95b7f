"""Two suites of growing sizes: SSync against dense alignment, and the neighboring methods."""

import math
from collections.abc import Sequence
from math import prod

import numpy as np
from examples.markdown import significant

from benchmarks.add_ons import ADD_ONS, CHANNELS, DENSE
from benchmarks.contenders import USUAL_MALLOC, name_of
from benchmarks.measure import measure
from benchmarks.plan import Job, Options
from benchmarks.results import Key, Results, Row
from ssync_loss.ssync.engines.cpu.calls import MAX_SLOTS

LINEAR, NEIGHBORS = "linear_vs_quadratic", "add_ons"
SLOTS = 11
# the shape of MOVi-C with few channels; every sweep of the add-ons passes through it
REFERENCE = {"B": 2, "T": 4, "S": SLOTS, "H": 24, "W": 24, "D": CHANNELS, "Kp": 4096, "weights": 1 << 22}
CLIP = {"B": 1, "T": 4, "S": SLOTS, "H": 16, "W": 16}
# the axes of a suite: a shape, and the least and the largest power of two that multiplies the axis
SWEEPS = {
    LINEAR: {"H*W": (CLIP | {"T": 16, "H": 4, "W": 4}, 0, 12), "T": (CLIP, 0, 10), "B": (CLIP, 0, 10)},
    NEIGHBORS: {
        "H*W": (REFERENCE, -3, 6),
        "S": (REFERENCE, 0, 5),
        "Kp": (REFERENCE, -2, 4),
        "weights": (REFERENCE, -2, 4),
    },
}
# larger sizes keep a GPU busy
MORE_ON_GPU = 4
# seconds; smaller sizes show that a method is quadratic
LONGEST_STEP = {LINEAR: math.inf, NEIGHBORS: 2.0}
MIN_SIZES = 5

Points = Sequence[tuple[int, float]]


def slope(points: Points, *, least: int = MIN_SIZES) -> float | None:
    """Fit the exponent p of cost ~ size^p; None for fewer sizes than `least`.

    >>> slope([(2, 20.0), (4, 80.0), (8, 320.0)], least=3)
    2.0
    """
    if len(points) < least:
        return None
    sizes, costs = np.log(points).T
    return round(float(np.polyfit(sizes, costs, 1)[0]), 3)


def predict(points: Points, size: int) -> float:
    """Predict the cost of a larger size from the two largest sizes before it.

    The growth is at least linear. From one size, it is quadratic.

    >>> predict([(8, 1.0), (16, 4.0)], 32), predict([(16, 4.0)], 32)
    (16.0, 16.0)
    """
    largest, cost = points[-1]
    exponent = slope(points[-2:], least=2)
    return cost * math.pow(size / largest, 2.0 if exponent is None else max(exponent, 1.0))


def size_of(key: Key) -> int:
    """Return the patches of a batch, or the length of the axis of an add-on."""
    axes = key.case.split("*") if key.suite == NEIGHBORS else "BTHW"
    return prod(key.sizes[axis] for axis in axes)


def history(results: Results, suite: str, case: str, contender: str, value: str) -> list[tuple[int, float]]:
    """Return the measurements of a contender along an axis: (size, value), from small to large."""
    rows = results.select(suite, case=case, contender=contender)
    return sorted((size_of(row.key), row.number(value)) for row in rows if value in row.values)


def shapes(suite: str, case: str, options: Options) -> list[dict[str, int]]:
    """Return the shapes along an axis, from small to large; fewer with ``--quick``.

    >>> [one["H"] * one["W"] for one in shapes("add_ons", "H*W", Options((), "cpu", (), False, 1.0, 1, 1))]
    [72, 144, 288, 576, 1152, 2304, 4608, 9216, 18432, 36864]
    """
    base, low, high = SWEEPS[suite][case]
    if suite == LINEAR and options.device == "cuda":
        high += MORE_ON_GPU
    found = []
    for power in range(low, high + 1):
        # W grows first: a grid is a square or two
        doublings = {"H": power // 2, "W": power - power // 2} if case == "H*W" else {case: power}
        grown = {axis: int(base[axis] * 2.0**doubling) for axis, doubling in doublings.items()}
        if power % 4 == 0 or not options.quick:
            found.append(base | grown)
    return found


def plan(suite: str, options: Options) -> list[Job]:
    """Plan the jobs of all sizes along all axes, with SSync as the first contender."""
    jobs = []
    for case in SWEEPS[suite]:
        if suite == NEIGHBORS:
            names = [name_of(options.backends[0]), *(one.name for one in ADD_ONS if one.axis == case)]
        else:
            # windows change nothing in B
            names = [*map(name_of, options.backends), *(one.name for one in DENSE[: 2 if case == "B" else None])]
        for shape in shapes(suite, case, options):
            keys = [Key(suite, case, name, tuple(shape.items())) for name in names]
            limited = (name_of("cpu"), name_of("triton")) if shape["S"] > MAX_SLOTS else ()
            keys = [key for key in keys if key.contender not in limited]
            jobs.append(Job(keys, measure, raised=True, stop=too_much))
            if suite == LINEAR and options.device == "cpu":
                usual = keys[0]._replace(contender=keys[0].contender + USUAL_MALLOC)
                jobs.append(Job([usual], measure, stop=too_much))
    return jobs


def too_much(results: Results, key: Key, options: Options) -> Row | None:
    """Return the row of a step that must not run: it should exceed a cap, or a smaller one did not run."""
    axis = "patches" if key.suite == LINEAR else key.case
    time_cap, memory_cap = min(options.time_cap, LONGEST_STEP[key.suite]), options.memory_cap / 1e9
    for status, value, cap, scale, unit in (
        ("time", "step", time_cap, 1, "s"),
        ("memory", "allocated", memory_cap, 1e9, "GB"),
    ):
        costs = history(results, key.suite, key.case, key.contender, value)
        # zero bytes predict nothing
        known = [(size, cost / scale) for size, cost in costs if cost > 0 and size < size_of(key)]
        if known and (wanted := predict(known, size_of(key))) > cap:
            after = f"after {significant(known[-1][1])} {unit} at {known[-1][0]:,} {axis}"
            note = f"a step should take {significant(wanted)} {unit} {after}; the cap is {cap:g} {unit}"
            return Row(key, status, note)
    for row in results.select(key.suite, case=key.case, contender=key.contender):
        if row.status != "measured" and size_of(row.key) < size_of(key):
            where = "" if row.note.startswith("as at ") else f"as at {size_of(row.key):,} {axis}: "
            return Row(key, row.status, where + row.note)
    return None
