"""What grows: SSync, dense alignment and the neighboring methods over sizes; time, memory, and where each has to stop.

Memory comes first, a process each, then all of a size in turn against the clock.
"""

import math
from collections.abc import Sequence
from functools import partial
from math import prod

import numpy as np
from examples.markdown import significant

from benchmarks.add_ons import ADD_ONS, BY_NAME, CHANNELS, DENSE, WIDTH
from benchmarks.contenders import USUAL_MALLOC, name_of
from benchmarks.measure import memory, times
from benchmarks.plan import Job, Options, Stop
from benchmarks.results import Key, Results, Values

LINEAR, NEIGHBORS = "linear_vs_quadratic", "add_ons"
SLOTS = 11
# frames of MOVi-C, features that a CPU can take; every sweep of the add-ons goes through this shape
REFERENCE = {"B": 2, "T": 4, "S": SLOTS, "H": 24, "W": 24, "D": CHANNELS, "Kp": 4096, "weights": 64 * WIDTH**2}
CLIP = {"B": 1, "T": 4, "S": SLOTS, "H": 16, "W": 16}
# by suite and by what grows: a shape, and how many times its axis is doubled; to a million patches in a clip or a batch
SWEEPS = {
    LINEAR: {"H*W": (CLIP | {"T": 16, "H": 4, "W": 4}, 0, 12), "T": (CLIP, 0, 10), "B": (CLIP, 0, 10)},
    NEIGHBORS: {
        "H*W": (REFERENCE, -3, 6),
        "S": (REFERENCE, 0, 5),
        "Kp": (REFERENCE, -2, 4),
        "weights": (REFERENCE, -2, 4),
    },
}
# more on a GPU, to keep it busy
MORE_ON_GPU = 4
UNITS = {"H*W": "patches a frame", "S": "slots", "Kp": "prototypes", "weights": "weights"}
# seconds; what is quadratic says all that it has to say before
LONGEST_STEP = {LINEAR: math.inf, NEIGHBORS: 2.0}
# between losses over millions of patches in different orders; a wrong label or patch moves more
LOSS_RTOL = 1e-4
MIN_SIZES = 5

Points = Sequence[tuple[int, float]]


def slope(points: Points, *, least: int = MIN_SIZES) -> float | None:
    """Fit the exponent p of cost ~ size^p; None below so many sizes.

    >>> slope([(2, 20.0), (4, 80.0), (8, 320.0)], least=3)
    2.0
    """
    if len(points) < least:
        return None
    sizes, costs = np.log(points).T
    return round(float(np.polyfit(sizes, costs, 1)[0]), 3)


def predict(points: Points, size: int) -> float:
    """Say what a larger size should cost, from the two largest before it.

    Growth is taken to be at least linear; one size alone is taken to grow quadratically, to be safe.

    >>> predict([(8, 1.0), (16, 4.0)], 32), predict([(16, 4.0)], 32)
    (16.0, 16.0)
    """
    largest, cost = points[-1]
    exponent = slope(points[-2:], least=2)
    return cost * math.pow(size / largest, 2.0 if exponent is None else max(exponent, 1.0))


def size_of(key: Key) -> int:
    """Return how large a row is: all patches of a batch, or what its axis counts."""
    axes = "BTHW" if key.suite == LINEAR else key.case.split("*")
    return prod(key.sizes[axis] for axis in axes)


def history(results: Results, suite: str, case: str, contender: str, value: str) -> list[tuple[int, float]]:
    """Return what was measured of a contender along an axis: (size, value), from small to large."""
    rows = results.select(suite, case=case, contender=contender)
    return sorted((size_of(row.key), row.number(value)) for row in rows if value in row.values)


def shapes(suite: str, case: str, options: Options) -> list[dict[str, int]]:
    """Return the shapes along an axis, from small to large; a rehearsal takes few.

    >>> [one["H"] * one["W"] for one in shapes("add_ons", "H*W", Options((), "cpu", (), False, 1.0, 1, 1))]
    [72, 144, 288, 576, 1152, 2304, 4608, 9216, 18432, 36864]
    """
    base, low, high = SWEEPS[suite][case]
    if suite == LINEAR and options.device == "cuda":
        high += MORE_ON_GPU
    found = []
    for power in range(low, high + 1):
        # grids as square as they can be
        doublings = {"H": power // 2, "W": power - power // 2} if case == "H*W" else {case: power}
        grown = {axis: int(base[axis] * 2.0**doubling) for axis, doubling in doublings.items()}
        if power % 4 == 0 or not options.quick:
            found.append(base | grown)
    return found


def contenders(suite: str, case: str, shape: dict[str, int], options: Options) -> list[str]:
    """Return who takes part at a size, beside SSync, which the others are compared with.

    Windows are linear in time, dense alignment in clips: there, larger sizes than these say nothing new.
    """
    if suite == NEIGHBORS:
        return [name_of(options.backends[0]), *(one.name for one in ADD_ONS if one.axis == case)]
    whole, windows = DENSE[:2], DENSE[2:]
    others = [
        *(whole if case != "B" or shape["B"] <= 64 else ()),
        *(windows if case == "H*W" or (case == "T" and shape["T"] <= 512) else ()),
    ]
    return [*map(name_of, options.backends), *(one.name for one in others)]


def plan(suite: str, options: Options) -> list[Job]:
    """Plan the jobs of every size along every axis."""
    jobs = []
    for case in SWEEPS[suite]:
        for shape in shapes(suite, case, options):
            keys = [Key(suite, case, name, tuple(shape.items())) for name in contenders(suite, case, shape, options)]
            # the usual malloc: what it keeps to itself is no memory that the loss needs
            jobs += [Job(memory, [key], "allocated", stop=too_much, check=partial(_differs, keys)) for key in keys]
            jobs.append(Job(times, keys, "step", raised=True))
            if suite == LINEAR and options.device == "cpu":
                jobs.append(Job(times, [keys[0]._replace(contender=keys[0].contender + USUAL_MALLOC)], "step"))
    return jobs


def too_much(results: Results, key: Key, options: Options) -> Stop | None:
    """Say what a step should take that may not be taken, going by smaller sizes."""
    unit = "patches" if key.suite == LINEAR else UNITS[key.case]
    time_cap = min(options.time_cap, LONGEST_STEP[key.suite])
    caps = (("time", "step", time_cap, 1.0, "s"), ("memory", "allocated", options.memory_cap / 1e9, 1e9, "GB"))
    for status, value, cap, scale, said in caps:
        costs = history(results, key.suite, key.case, key.contender, value)
        # what takes nothing says nothing of what larger sizes take
        known = [(size, cost / scale) for size, cost in costs if cost > 0 and size < size_of(key)]
        if known and (wanted := predict(known, size_of(key))) > cap:
            size, cost = known[-1]
            note = (
                f"a step should take {significant(wanted)} {said} after {significant(cost)} {said} at {size:,} {unit}"
            )
            return status, f"{note}; the cap is {cap:g} {said}"
    # without a number at a smaller size, nothing tells what this one would take
    for row in results.select(key.suite, case=key.case, contender=key.contender):
        if row.status != "measured" and size_of(row.key) < size_of(key):
            where = "" if row.note.startswith("as at ") else f"as at {size_of(row.key):,} {unit}: "
            return row.status, where + row.note
    return None


def _differs(keys: Sequence[Key], results: Results, key: Key, values: Values) -> Stop | None:
    """Compare a loss with that of the first who computes the same: the gate is small, sizes are not."""
    entry = BY_NAME.get(key.contender)
    twin = keys[keys.index(key) - entry.twin] if entry else keys[0]
    first = results.rows.get(twin)
    if first is None or "loss" not in first.values or "loss" not in values:
        return None
    own, expected = float(values["loss"]), first.number("loss")  # type: ignore[arg-type]
    if abs(own - expected) <= LOSS_RTOL * abs(expected):
        return None
    return "wrong", f"the loss is {own:.8g}, and {expected:.8g} by {twin.contender}"
