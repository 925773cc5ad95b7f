"""What must be shown, and whether a file of results shows it."""

from collections.abc import Callable, Iterable
from operator import ge, le, lt
from typing import Any, NamedTuple

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


def _value(rows: Iterable[Row], name: str) -> float | Spread | None:
    """Return the value of the first row that has it."""
    return next((row.values[name] for row in rows if name in row.values), None)


def _worst(rows: Iterable[Row], name: str) -> float | None:
    return max((row.number(name) for row in rows if name in row.values), default=None)


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
    name = held_to_bars(results)

    def known(contender: str, value: str, size: int = COMPARED_AT) -> float | None:
        return dict(history(results, LINEAR, "H*W", contender, value)).get(size)

    # as they were taken in turn
    faster = known("dense", "ratio") if name == here(results)[0] else None
    own, dense, step = known(name, "allocated"), known("dense", "allocated"), known(name, "step", LONG_CLIP)
    smaller = dense / own if own and dense else None
    at = f"than full dense alignment at {COMPARED_AT:,} patches"
    ran = (NOT_MEASURED, "-") if step is None else (MET, f"{1e3 * step:.3g} ms")
    return [
        _bar(f"{name}: faster {at}", "≥", MIN_SPEEDUP, faster, ",.0f", "x"),
        _bar(f"{name}: less memory {at}", "≥", MIN_MEMORY_RATIO, smaller, ",.0f", "x"),
        Bar(f"{name}: {LONG_CLIP:,} patches in one clip", "runs", *ran[::-1]),
    ]


def _shares(results: Results) -> list[Bar]:
    device, name = results.machine["device"], held_to_bars(results)
    limits = [(case, name, MAX_SHARE[device]) for case in PUBLISHED]
    limits.append((training_step.EXAMPLE, name, MAX_EXAMPLE_SHARE))
    if device == "cpu":
        limits.append((training_step.EXAMPLE, name + TWO_THREADS, MAX_EXAMPLE_SHARE))
    found = []
    for case, contender, limit in limits:
        share = _value(results.select(training_step.SUITE, case=case, contender=contender), "share")
        found.append(_bar(f"{contender}: share of a training step, {case}", "<", limit, share, ".2%"))
    return found


def steps(results: Results, contender: str, clips: int | None = None, dtype: str = "float32") -> list[Row]:
    """Return the rows of a MOVi-C step, of a number of clips or any."""
    wanted = kernels.FRAMES["MOVi-C"] | ({} if clips is None else {"B": clips})
    rows = results.select(kernels.SUITE, case=kernels.STEP, contender=contender, dtype=dtype)
    return [row for row in rows if row.key.sizes.items() >= wanted.items()]


def _on_cpu(results: Results) -> list[Bar]:
    name, batch = held_to_bars(results), kernels.BATCH
    found = []
    for clips, limit in MAX_EXPONENTIALS.items():
        claim = f"{name}: step over `torch.exp` of both maps, MOVi-C, {clips} clips"
        found.append(_bar(claim, "≤", limit, _value(steps(results, name, clips), "over_exp"), ".1f"))
    speedup = _value(steps(results, name + TWO_THREADS, batch), "speedup")
    waiting = _worst(steps(results, name), "maps_waiting")
    first = _value(results.select(kernels.SUITE, case=kernels.FIRST_USE), "step")
    claims: tuple[Any, ...] = (
        (f"faster on two threads, MOVi-C, {batch} clips", "≥", MIN_THREADS_SPEEDUP, speedup, ".2f", "x"),
        ("maps that wait for the backward beyond inputs and gradients, MOVi-C", "≤", MAX_WAITING_MAPS, waiting, ".2f"),
        ("first use, import and compiler included", "≤", MAX_FIRST_USE_SECONDS, first, ".1f", " s"),
    )
    return [*found, *(_bar(f"{name}: {claim}", *rest) for claim, *rest in claims)]


def _on_gpu(results: Results) -> list[Bar]:
    name = held_to_bars(results)
    replays = results.select(kernels.SUITE, case=kernels.STEP, contender=name + REPLAY)
    launches = _worst(results.select(kernels.SUITE, case=kernels.STEP, contender=name), "launches")
    replayed = _worst(steps(results, name + REPLAY, kernels.BATCH, "float16"), "step")
    microseconds = None if replayed is None else 1e6 * replayed
    large = _worst([row for row in replays if row.key.sizes["B"] > kernels.BATCH], "over_floor")
    claims: tuple[Any, ...] = (
        ("launches of a step", "≤", MAX_LAUNCHES, launches, ".0f"),
        ("µs of a replayed step, MOVi-C, 64 clips, float16", "≤", 1e6 * MAX_REPLAY_SECONDS, microseconds, ".0f"),
        ("replayed step over its bandwidth floor, large maps", "≤", MAX_OVER_FLOOR, large, ".2f"),
    )
    return [_bar(f"{name}: {claim}", *rest) for claim, *rest in claims]
