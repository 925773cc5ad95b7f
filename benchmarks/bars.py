"""What must be shown, and whether a file of results shows it."""

from collections.abc import Callable, Iterable
from operator import ge, le, lt
from typing import NamedTuple

from benchmarks.add_ons import BY_NAME
from benchmarks.contenders import AUTO, REPLAY, TWO_THREADS, name_of
from benchmarks.results import Results, Row, Spread
from benchmarks.slot_video_model import PUBLISHED
from benchmarks.suites import kernels, training_step
from benchmarks.suites.growth import LINEAR, Slope, fit, history

SWEEPS = ("H*W", "T", "B")
# patches from which time is in the work and not in calling it; smaller sizes would flatter a slope
FIT_FROM = {"cpu": {"SSync": 65_536, "dense": 1024}, "cuda": {"SSync": 1_048_576, "dense": 4096}}
MAX_TIME_SLOPE, MAX_MEMORY_SLOPE = 1.15, 1.05
COMPARED_AT = 16_384
MIN_SPEEDUP, MIN_MEMORY_RATIO = 1000, 500
LONG_CLIP = 1_048_576
MAX_SHARE = {"cpu": 0.005, "cuda": 0.01}
MAX_EXAMPLE_SHARE = 0.01
# clips of MOVi-C, and how many times the exponentials a step may take
MAX_EXPONENTIALS = {4: 3.5, 64: 3.2}
MIN_THREADS_SPEEDUP = 1.7
MAX_WAITING_MAPS = 0.1
MAX_FIRST_USE_SECONDS = 3.0
MAX_LAUNCHES, MAX_REPLAY_SECONDS, MAX_OVER_FLOOR = 9, 60e-6, 1.5

MET, MISSED, NOT_MEASURED = "met", "**missed**", "not measured"
COMPARE: dict[str, Callable[[float, float], bool]] = {"<": lt, "≤": le, "≥": ge}


class Bar(NamedTuple):
    """A claim, its limit, what was measured, and whether that is enough."""

    claim: str
    limit: str
    measured: str
    verdict: str


def bars(results: Results) -> list[Bar]:
    """Hold the results of a machine against every bar that is about its kind."""
    on_gpu = results.machine["device"] == "cuda"
    found = [*_slopes(results), *_against_dense(results), *_shares(results)]
    return [*found, *(_on_gpu(results) if on_gpu else _on_cpu(results))]


def here(results: Results) -> list[str]:
    """Return SSync by every backend that was measured here; others are compared with the first."""
    return [name_of(one) for one in results.settings["backends"]]


def held_to_bars(results: Results) -> str:
    """Return SSync by what ``"auto"`` takes; of other backends, only the slopes have bars."""
    return name_of(AUTO[results.machine["device"]])


def slope_of(results: Results, sweep: str, contender: str, value: str) -> Slope | None:
    """Fit the slope of a contender's ``"step"`` or ``"allocated"`` in a sweep, from `FIT_FROM` on."""
    start = FIT_FROM[results.machine["device"]]["dense" if contender in BY_NAME else "SSync"]
    return fit([point for point in history(results, LINEAR, sweep, contender, value) if point[0] >= start])


def _bar(claim: str, sign: str, limit: float, value: float | Spread | None, form: str, unit: str = "") -> Bar:
    """Hold what was measured, or its median, against its limit; quartiles show what a verdict near it is worth."""
    bound = f"{sign} {limit:{form}}{unit}"
    if value is None:
        return Bar(claim, bound, "-", NOT_MEASURED)
    middle = value.median if isinstance(value, Spread) else value
    said = f"{middle:{form}}{unit}"
    if isinstance(value, Spread):
        said += f" ({value.q1:{form}}{unit} to {value.q3:{form}}{unit})"
    return Bar(claim, bound, said, MET if COMPARE[sign](middle, limit) else MISSED)


def _spread(rows: Iterable[Row], value: str) -> Spread | None:
    """Return the value of the first row that has it."""
    return next((row.spread(value) for row in rows if value in row.values), None)


def _slopes(results: Results) -> list[Bar]:
    found = []
    for contender in here(results):
        for sweep in SWEEPS:
            for measure, value, limit in (("time", "step", MAX_TIME_SLOPE), ("memory", "allocated", MAX_MEMORY_SLOPE)):
                slope = slope_of(results, sweep, contender, value)
                claim = f"{contender}: slope of {measure} in {sweep.replace('*', '·')}"
                exponent = slope.exponent if slope is not None and slope.enough else None
                found.append(_bar(claim, "≤", limit, exponent, ".2f"))
    return found


def _against_dense(results: Results) -> list[Bar]:
    contender, at = held_to_bars(results), f"than full dense alignment at {COMPARED_AT:,} patches"

    def known(name: str, value: str) -> float | None:
        return dict(history(results, LINEAR, "H*W", name, value)).get(COMPARED_AT)

    found = []
    for claim, value, limit in (("faster", "step", MIN_SPEEDUP), ("less memory", "allocated", MIN_MEMORY_RATIO)):
        own, dense = known(contender, value), known("dense", value)
        ratio = dense / own if own and dense else None
        if value == "step" and contender == here(results)[0]:
            # as they were taken in turn
            ratio = known("dense", "ratio")
        found.append(_bar(f"{contender}: {claim} {at}", "≥", limit, ratio, ",.0f", "x"))
    steps = dict(history(results, LINEAR, "H*W", contender, "step"))
    said = f"{1e3 * steps[LONG_CLIP]:.3g} ms" if LONG_CLIP in steps else "-"
    verdict = MET if LONG_CLIP in steps else NOT_MEASURED
    return [*found, Bar(f"{contender}: {LONG_CLIP:,} patches in one clip", "runs", said, verdict)]


def _shares(results: Results) -> list[Bar]:
    device, name = results.machine["device"], held_to_bars(results)
    limits = [(case, name, MAX_SHARE[device]) for case in PUBLISHED]
    limits.append((training_step.EXAMPLE, name, MAX_EXAMPLE_SHARE))
    if device == "cpu":
        limits.append((training_step.EXAMPLE, name + TWO_THREADS, MAX_EXAMPLE_SHARE))
    found = []
    for case, contender, limit in limits:
        rows = results.select(suite=training_step.SUITE, case=case, contender=contender)
        claim = f"{contender}: share of a training step, {case}"
        found.append(_bar(claim, "<", limit, _spread(rows, "share"), ".2%"))
    return found


def steps(results: Results, contender: str) -> dict[int, Row]:
    """Return the rows of a MOVi-C step by number of clips."""
    wanted = kernels.FRAMES["MOVi-C"].items()
    rows = results.select(suite=kernels.SUITE, case=kernels.STEP, contender=contender)
    return {row.key.sizes["B"]: row for row in rows if row.key.sizes.items() >= wanted}


def _on_cpu(results: Results) -> list[Bar]:
    name = held_to_bars(results)
    own, threaded = steps(results, name), steps(results, name + TWO_THREADS)
    found = []
    for clips, limit in MAX_EXPONENTIALS.items():
        claim = f"{name}: step over `torch.exp` of both maps, MOVi-C, {clips} clips"
        ratio = _spread([row for at, row in own.items() if at == clips], "over_exp")
        found.append(_bar(claim, "≤", limit, ratio, ".1f"))
    speedup = _spread([row for at, row in threaded.items() if at == max(MAX_EXPONENTIALS)], "speedup")
    claim = f"{name}: faster on two threads, MOVi-C, {max(MAX_EXPONENTIALS)} clips"
    found.append(_bar(claim, "≥", MIN_THREADS_SPEEDUP, speedup, ".2f", "x"))
    waiting = [row.number("maps_waiting") for row in own.values() if "maps_waiting" in row.values]
    claim = f"{name}: maps that wait for the backward beyond inputs and gradients, MOVi-C"
    found.append(_bar(claim, "≤", MAX_WAITING_MAPS, max(waiting, default=None), ".2f"))
    first = _spread(results.select(suite=kernels.SUITE, case=kernels.FIRST_USE), "step")
    claim = f"{name}: first use, import and compiler included"
    return [*found, _bar(claim, "≤", MAX_FIRST_USE_SECONDS, first, ".1f", " s")]


def _on_gpu(results: Results) -> list[Bar]:
    name = held_to_bars(results)
    shape = {"B": 64, **kernels.FRAMES["MOVi-C"]}

    def largest(value: str, rows: list[Row], factor: float = 1.0) -> float | None:
        return max((factor * row.number(value) for row in rows if value in row.values), default=None)

    replays = results.select(suite=kernels.SUITE, case=kernels.STEP, contender=name + REPLAY)
    published = [row for row in replays if (row.key.sizes, row.key.dtype) == (shape, "float16")]
    large = [row for row in replays if row.key.sizes["B"] > shape["B"]]
    launches = largest("launches", results.select(suite=kernels.SUITE, case=kernels.STEP, contender=name))
    microseconds, limit = largest("step", published, 1e6), 1e6 * MAX_REPLAY_SECONDS
    over_floor = largest("over_floor", large)
    return [
        _bar(f"{name}: launches of a step", "≤", MAX_LAUNCHES, launches, ".0f"),
        _bar(f"{name}: µs of a replayed step, MOVi-C, 64 clips, float16", "≤", limit, microseconds, ".0f"),
        _bar(f"{name}: replayed step over its bandwidth floor, large maps", "≤", MAX_OVER_FLOOR, over_floor, ".2f"),
    ]
