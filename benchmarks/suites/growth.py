"""What grows: SSync, dense alignment and the neighboring methods over sizes; time, memory, and where each has to stop.

Memory comes first, a process each, then all of a size in turn against the clock.
"""

import math
from collections.abc import Sequence
from functools import partial
from math import prod
from typing import NamedTuple

import numpy as np

from benchmarks.add_ons import ADD_ONS, BY_NAME, CHANNELS, DENSE, WIDTH
from benchmarks.contenders import USUAL_MALLOC, name_of
from benchmarks.measure import memory, times
from benchmarks.plan import Job, Options, Stop
from benchmarks.results import Key, Results, Values

LINEAR, NEIGHBORS = "linear_vs_quadratic", "add_ons"
SLOTS = 11
# frames of MOVi-C, features that a CPU can take; every sweep of the add-ons goes through this shape
CLIPS = {"B": 2, "T": 4, "S": SLOTS, "H": 24, "W": 24}
REFERENCE = CLIPS | {"D": CHANNELS, "Kp": 4096, "weights": 64 * WIDTH**2}
UNITS = {"H*W": "patches a frame", "S": "slots", "Kp": "prototypes", "weights": "weights"}
# seconds; what is quadratic says all that it has to say before
LONGEST_STEP = {LINEAR: math.inf, NEIGHBORS: 2.0}
# between losses over millions of patches in different orders; a wrong label or patch moves more
LOSS_RTOL = 1e-4
MIN_SIZES = 5


class Slope(NamedTuple):
    """The exponent p of a fit cost ~ size^p, and what it was fitted to."""

    exponent: float
    first: int
    last: int
    num_sizes: int

    @property
    def enough(self) -> bool:
        """Whether enough sizes entered the fit."""
        return self.num_sizes >= MIN_SIZES


def fit(points: Sequence[tuple[int, float]]) -> Slope | None:
    """Fit a line to the logarithms of sizes and costs, from small to large; None below two sizes.

    >>> fit([(2, 20.0), (4, 80.0), (8, 320.0)])
    Slope(exponent=2.0, first=2, last=8, num_sizes=3)
    """
    if len(points) < 2:
        return None
    sizes, costs = np.log(points).T
    exponent = np.polyfit(sizes, costs, 1)[0]
    return Slope(round(float(exponent), 3), points[0][0], points[-1][0], len(points))


def predict(points: Sequence[tuple[int, float]], size: int) -> float | None:
    """Say what a larger size should cost, from the two largest before it; None without any.

    Growth is taken to be at least linear; one size alone is taken to grow quadratically, to be safe.

    >>> predict([(8, 1.0), (16, 4.0)], 32), predict([(16, 4.0)], 32)
    (16.0, 16.0)
    """
    known = [point for point in points if point[0] < size][-2:]
    if not known:
        return None
    largest, cost = known[-1]
    exponent = 2.0
    if len(known) == 2:
        exponent = max(math.log(cost / known[0][1]) / math.log(largest / known[0][0]), 1.0)
    return cost * math.pow(size / largest, exponent)


def num_patches(key: Key) -> int:
    """Count the patches of a batch."""
    return prod(key.sizes[axis] for axis in "BTHW")


def size_of(key: Key) -> int:
    """Return how large a row is: all patches of a batch, or what its axis counts."""
    return num_patches(key) if key.suite == LINEAR else prod(key.sizes[axis] for axis in key.case.split("*"))


def unit_of(key: Key) -> str:
    """Return what sizes are counted in."""
    return "patches" if key.suite == LINEAR else UNITS[key.case]


def history(results: Results, suite: str, case: str, contender: str, value: str) -> list[tuple[int, float]]:
    """Return what was measured of a contender along an axis: (size, value), from small to large."""
    rows = results.select(suite, case=case, contender=contender)
    return sorted((size_of(row.key), row.number(value)) for row in rows if value in row.values)


def shapes(suite: str, case: str, options: Options) -> list[dict[str, int]]:
    """Return the shapes along an axis, from small to large; a rehearsal takes few.

    >>> [shape["H"] * shape["W"] for shape in shapes("add_ons", "H*W", Options((), "cpu", (), False, 1.0, 1, 1))]
    [72, 144, 288, 576, 1152, 2304, 4608, 9216, 18432, 36864]
    """
    if suite == NEIGHBORS:
        down, up = {"H*W": (3, 6), "S": (0, 5), "Kp": (2, 4), "weights": (2, 4)}[case]
        powers = range(-down, up + 1)[max(down - 1, 0) :][:2] if options.quick else range(-down, up + 1)
        return [_scaled(case, power) for power in powers]
    base = {"H*W": {"B": 1, "T": 16}, "T": {"B": 1, "H": 16, "W": 16}, "B": {"T": 4, "H": 16, "W": 16}}[case]
    found = []
    for power in _ladder(case, options):
        others = (1 << power) // prod(base.values())
        grown = {case: others}
        if case == "H*W":
            height = 1 << (others.bit_length() - 1) // 2
            grown = {"H": height, "W": others // height}
        sizes = {**base, **grown, "S": SLOTS}
        found.append({axis: sizes[axis] for axis in "BTSHW"})
    return found


def _ladder(case: str, options: Options) -> list[int]:
    """Return powers of two of patches: from 256, or a clip, to a million, and sixteen on a GPU to keep it busy."""
    powers = range(8 if case == "H*W" else 10, 25 if options.device == "cuda" else 21)
    if options.quick:
        return list(powers[:: 2 if case == "H*W" else 4])
    if options.device == "cuda":
        # every second one where no fit needs the others
        return [k for k in powers if k % 2 == 0 or 12 <= k <= 16 or k >= 20]
    return list(powers)


def _scaled(case: str, power: int) -> dict[str, int]:
    """Return the reference with an axis so many times doubled, or halved; grids as square as they can be."""

    def doubled(size: int, power: int) -> int:
        return size << power if power > 0 else size >> -power

    if case != "H*W":
        return REFERENCE | {case: doubled(REFERENCE[case], power)}
    return REFERENCE | {"H": doubled(REFERENCE["H"], power // 2), "W": doubled(REFERENCE["W"], power - power // 2)}


def contenders(suite: str, case: str, shape: dict[str, int], options: Options) -> list[str]:
    """Return who takes part at a size, beside SSync, which the others are compared with.

    Windows are linear in time, dense alignment in clips: there, larger sizes than these say nothing new.
    """
    if suite == NEIGHBORS:
        chosen = [one.name for one in ADD_ONS if one.axis == case and not (one.cpu_only and options.device != "cpu")]
        return [name_of(options.backends[0]), *chosen]
    whole, windows = DENSE[:2], DENSE[2:]
    return [
        *map(name_of, options.backends),
        *(whole if case != "B" or shape["B"] <= 64 else ()),
        *(windows if case == "H*W" or (case == "T" and shape["T"] <= 512) else ()),
    ]


def axes(suite: str) -> list[str]:
    """Return what grows."""
    return list(UNITS) if suite == NEIGHBORS else ["H*W", "T", "B"]


def plan(suite: str, options: Options) -> list[Job]:
    """Plan the jobs of every size along every axis."""
    return [
        job
        for case in axes(suite)
        for shape in shapes(suite, case, options)
        for job in _jobs(suite, case, shape, options)
    ]


def _jobs(suite: str, case: str, shape: dict[str, int], options: Options) -> list[Job]:
    keys = [Key(suite, case, name, tuple(shape.items())) for name in contenders(suite, case, shape, options)]
    # the usual malloc: what it keeps to itself is no memory that the loss needs
    jobs = [Job(memory, [key], "allocated", stop=too_much, check=partial(_differs, keys)) for key in keys]
    jobs.append(Job(times, keys, "step", raised=True))
    if suite == LINEAR and options.device == "cpu" and (case == "H*W" or not options.quick):
        jobs.append(Job(times, [keys[0]._replace(contender=keys[0].contender + USUAL_MALLOC)], "step"))
    return jobs


def too_much(results: Results, key: Key, options: Options) -> Stop | None:
    """Say what a step should take that may not be taken, going by smaller sizes."""
    time_cap = min(options.time_cap, LONGEST_STEP[key.suite])
    caps = (("time", "step", time_cap, 1.0, "s"), ("memory", "allocated", options.memory_cap / 1e9, 1e9, "GB"))
    for status, value, cap, scale, said in caps:
        costs = history(results, key.suite, key.case, key.contender, value)
        # what takes nothing says nothing of what larger sizes take
        known = [(size, cost / scale) for size, cost in costs if cost > 0 and size < size_of(key)]
        wanted = predict(known, size_of(key))
        if wanted is not None and wanted > cap:
            size, cost = known[-1]
            note = f"a step should take {_short(wanted)} {said} after {_short(cost)} {said} at {size:,} {unit_of(key)}"
            return status, f"{note}; the cap is {cap:g} {said}"
    # without a number at a smaller size, nothing tells what this one would take
    for row in results.select(key.suite, case=key.case, contender=key.contender):
        if row.status != "measured" and size_of(row.key) < size_of(key):
            where = f"as at {size_of(row.key):,} {unit_of(key)}"
            return row.status, row.note if row.note.startswith("as at ") else f"{where}: {row.note}"
    return None


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _differs(keys: Sequence[Key], results: Results, key: Key, values: Values) -> Stop | None:
    """Compare a loss with that of the first who computes the same: the gate is small, sizes are not."""
    twin = next(one for one in keys if _value_of(one.contender) == _value_of(key.contender))
    first = results.rows.get(twin)
    if first is None or "loss" not in first.values or "loss" not in values:
        return None
    own, expected = float(values["loss"]), first.number("loss")  # type: ignore[arg-type]
    if abs(own - expected) <= LOSS_RTOL * abs(expected):
        return None
    return "wrong", f"the loss is {own:.8g}, and {expected:.8g} by {twin.contender}"


def _value_of(contender: str) -> str:
    return BY_NAME[contender].value or contender if contender in BY_NAME else "SSync"
