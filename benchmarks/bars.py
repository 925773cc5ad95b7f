"""What must be shown, and whether a file of results shows it."""

from collections.abc import Callable
from operator import ge, le, lt
from typing import NamedTuple

from benchmarks.contenders import AUTO, DENSE, TWO_THREADS, Contender, ssync_contender
from benchmarks.results import Results, Row, Spread
from benchmarks.slopes import Slope, fit
from benchmarks.slot_video_model import PUBLISHED
from benchmarks.suites import kernels, training_step
from benchmarks.suites.linear_vs_quadratic import history, num_patches

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
    found = [*_slopes(results), *_against_dense(results), *_shares(results)]
    return [*found, *(_on_gpu(results) if results.environment["device"] == "cuda" else _on_cpu(results))]


def slope_of(results: Results, sweep: str, contender: Contender, measure: str, *, whole: bool = False) -> Slope | None:
    """Fit the slope of a contender's time or memory in a sweep.

    Args:
        results: of one machine.
        sweep: which axis grows.
        contender: whose.
        measure: ``"time"``, ``"time, default allocator"`` or ``"memory"``.
        whole: over all sizes, instead of from `FIT_FROM` on.
    """
    value = "allocated" if measure == "memory" else "step"
    start = 0 if whole else fit_from(results, contender)
    return fit(history(results, sweep, contender, measure, value), start=start)


def fit_from(results: Results, contender: Contender) -> int:
    """Return the least number of patches that enters a contender's fit."""
    return FIT_FROM[results.environment["device"]]["dense" if contender.backend is None else "SSync"]


def movi_c_steps(results: Results, measure: str = "time", *, suffix: str = "") -> dict[int, Row]:
    """Return the rows of a MOVi-C step by what is held to the bars, and a suffix to its name, by number of clips."""
    wanted = kernels.FRAMES["MOVi-C"]
    name = held_to_bars(results).name + suffix
    return {
        row.id.sizes["B"]: row
        for row in results.select(suite=kernels.SUITE, case=kernels.STEP, contender=name, measure=measure)
        if row.status == "measured" and row.id.sizes.items() >= wanted.items()
    }


def here(results: Results) -> list[Contender]:
    """Return SSync by every backend that was measured here; others are compared with the first."""
    return [ssync_contender(one) for one in results.settings["backends"]]


def held_to_bars(results: Results) -> Contender:
    """Return SSync by what ``"auto"`` takes; of other backends, only the slopes have bars."""
    return ssync_contender(AUTO[results.environment["device"]])


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


def _slopes(results: Results) -> list[Bar]:
    found = []
    for contender in here(results):
        for sweep in SWEEPS:
            for measure, limit in (("time", MAX_TIME_SLOPE), ("memory", MAX_MEMORY_SLOPE)):
                slope = slope_of(results, sweep, contender, measure)
                enough = slope is not None and slope.enough
                claim = f"{contender.name}: slope of {measure} in {sweep.replace('*', '·')}"
                found.append(_bar(claim, "≤", limit, slope.exponent if slope and enough else None, ".2f"))
    return found


def _against_dense(results: Results) -> list[Bar]:
    contender, at = held_to_bars(results), f"than full dense alignment at {COMPARED_AT:,} patches"
    found = []
    for measure, claim, limit in (("time", "faster", MIN_SPEEDUP), ("memory", "less memory", MIN_MEMORY_RATIO)):
        ratio = _ratio(results, contender, measure)
        found.append(_bar(f"{contender.name}: {claim} {at}", "≥", limit, ratio, ",.0f", "x"))
    steps = dict(history(results, "H*W", contender, "time", "step"))
    said = f"{1e3 * steps[LONG_CLIP]:.3g} ms" if LONG_CLIP in steps else "-"
    verdict = MET if LONG_CLIP in steps else NOT_MEASURED
    return [*found, Bar(f"{contender.name}: {LONG_CLIP:,} patches in one clip", "runs", said, verdict)]


def _ratio(results: Results, contender: Contender, measure: str) -> float | None:
    """Return how many times as much dense alignment takes; times as they were taken in turn, if they were."""
    value = "allocated" if measure == "memory" else "step"
    own = dict(history(results, "H*W", contender, measure, value)).get(COMPARED_AT)
    dense = dict(history(results, "H*W", DENSE, measure, value)).get(COMPARED_AT)
    if own is None or dense is None:
        return None
    if measure == "time" and contender == here(results)[0]:
        return dict(history(results, "H*W", DENSE, measure, "ratio"))[COMPARED_AT]
    return dense / own


def _shares(results: Results) -> list[Bar]:
    device, name = results.environment["device"], held_to_bars(results).name
    limits = [(case, name, MAX_SHARE[device]) for case in PUBLISHED]
    limits.append((training_step.EXAMPLE, name, MAX_EXAMPLE_SHARE))
    if device == "cpu":
        limits.append((training_step.EXAMPLE, name + TWO_THREADS, MAX_EXAMPLE_SHARE))
    rows = {(row.id.case, row.id.contender): row for row in results.select(suite=training_step.SUITE)}
    found = []
    for case, contender, limit in limits:
        row = rows.get((case, contender))
        share = row.spread("share") if row is not None and row.status == "measured" else None
        found.append(_bar(f"{contender}: share of a training step, {case}", "<", limit, share, ".2%"))
    return found


def _on_cpu(results: Results) -> list[Bar]:
    name, steps = held_to_bars(results).name, movi_c_steps(results)
    found = []
    for clips, limit in MAX_EXPONENTIALS.items():
        ratio = steps[clips].spread("over_exp") if clips in steps else None
        claim = f"{name}: step over `torch.exp` of both maps, MOVi-C, {clips} clips"
        found.append(_bar(claim, "≤", limit, ratio, ".1f"))
    threaded = movi_c_steps(results, suffix=TWO_THREADS).get(64)
    speedup = None if threaded is None else threaded.spread("speedup")
    found.append(
        _bar(f"{name}: faster on two threads, MOVi-C, 64 clips", "≥", MIN_THREADS_SPEEDUP, speedup, ".2f", "x")
    )
    waiting = [row.number("maps_waiting") for row in movi_c_steps(results, "memory").values()]
    claim = f"{name}: maps that wait for the backward beyond inputs and gradients, MOVi-C"
    found.append(_bar(claim, "≤", MAX_WAITING_MAPS, max(waiting, default=None), ".2f"))
    rows = results.select(suite=kernels.SUITE, case=kernels.FIRST_USE)
    first = [row.spread("step") for row in rows if row.status == "measured"]
    claim = f"{name}: first use, import and compiler included"
    return [*found, _bar(claim, "≤", MAX_FIRST_USE_SECONDS, first[0] if first else None, ".1f", " s")]


def _on_gpu(results: Results) -> list[Bar]:
    name = held_to_bars(results).name
    steps = [row for row in results.select(suite=kernels.SUITE, case=kernels.STEP) if row.status == "measured"]
    launches = [row.number("launches") for row in steps if (row.id.contender, row.id.measure) == (name, "counts")]
    timed = [row for row in steps if (row.id.contender, row.id.measure) == (name + kernels.REPLAY, "time")]
    shape = {"B": 64, **kernels.FRAMES["MOVi-C"]}
    replayed = [row.number("step") for row in timed if (row.id.sizes, row.id.dtype) == (shape, "float16")]
    large = [row.number("over_floor") for row in timed if _map_bytes(row) >= kernels.LARGE_MAP_BYTES]
    return [
        _bar(f"{name}: launches of a step", "≤", MAX_LAUNCHES, max(launches, default=None), ".0f"),
        _bar(
            f"{name}: µs of a replayed step, MOVi-C, 64 clips, float16",
            "≤",
            1e6 * MAX_REPLAY_SECONDS,
            1e6 * max(replayed) if replayed else None,
            ".0f",
        ),
        _bar(
            f"{name}: replayed step over its bandwidth floor, large maps",
            "≤",
            MAX_OVER_FLOOR,
            max(large, default=None),
            ".2f",
        ),
    ]


def _map_bytes(row: Row) -> int:
    return num_patches(row.id.sizes) * row.id.sizes["S"] * (2 if row.id.dtype == "float16" else 4)
