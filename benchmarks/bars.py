"""What must be shown, and whether a file of results shows it."""

from collections.abc import Iterable, Iterator, Sequence
from operator import ge, le, lt
from typing import Any, NamedTuple

from benchmarks.add_ons import BY_NAME
from benchmarks.contenders import AUTO, REPLAY, STEP, TWO_THREADS, name_of
from benchmarks.results import Results, Row, Spread
from benchmarks.slot_video_model import PUBLISHED
from benchmarks.suites import growth, kernels, training_step
from benchmarks.suites.growth import LINEAR

SWEEPS = {"H*W": "H·W", "T": "T", "B": "B"}
# patches from which time is in the work and not in calling it; smaller sizes would flatter a slope
FIT_FROM = {"cpu": {"SSync": 65_536, "dense": 1024}, "cuda": {"SSync": 1_048_576, "dense": 4096}}
MAX_TIME_SLOPE, MAX_MEMORY_SLOPE = 1.15, 1.05
COMPARED_AT, LONG_CLIP = 16_384, 1_048_576

MET, MISSED, NOT_MEASURED = "met", "**missed**", "**not measured**"
COMPARE = {"<": lt, "≤": le, "≥": ge}


class Bar(NamedTuple):
    """A claim, its limit, what was measured, and whether that is enough."""

    claim: str
    limit: str
    measured: str
    verdict: str

    @classmethod
    def of(
        cls, claim: str, sign: str, limit: float, values: Sequence[float | Spread | None], form: str, unit: str = ""
    ) -> "Bar":
        """Hold all that was measured against a limit; quartiles show what a verdict near it is worth."""
        said, enough = [], []
        for value in values:
            if value is None:
                continue
            middle, low, high = value[:3] if isinstance(value, Spread) else (value,) * 3
            text, *quartiles = (f"{one:{form}}{unit}" for one in (middle, low, high))
            said.append(text if {*quartiles} == {text} else f"{text} ({' to '.join(quartiles)})")
            enough.append(COMPARE[sign](middle, limit))
        verdict = MET if len(said) == len(values) > 0 else NOT_MEASURED
        if not all(enough):
            verdict = MISSED
        return cls(claim, f"{sign} {limit:{form}}{unit}", ", ".join(said) or "-", verdict)


def verdict(found: Sequence[Bar]) -> str:
    """Say which bars are not met."""
    by_verdict = {one: [bar.claim for bar in found if bar.verdict == one] for one in (MISSED, NOT_MEASURED)}
    lines = [f"{one}: {'; '.join(claims)}." for one, claims in by_verdict.items() if claims]
    return " ".join(lines) or f"All {len(found)} are met."


def here(results: Results) -> list[str]:
    """Return SSync by every backend that was measured here; others are compared with the first."""
    return [name_of(one) for one in results.settings["backends"]]


def slope_of(results: Results, sweep: str, contender: str, value: str) -> float | None:
    """Fit the slope of a contender's ``"step"`` or ``"allocated"`` in a sweep, from `FIT_FROM` on."""
    start = FIT_FROM[results.machine["device"]]["dense" if contender in BY_NAME else "SSync"]
    points = growth.history(results, LINEAR, sweep, contender, value)
    return growth.slope([point for point in points if point[0] >= start])


def bars(results: Results) -> list[Bar]:
    """Hold the results of a machine against every bar: slopes of all backends, all else by what ``"auto"`` takes."""
    found = []
    for contender in here(results):
        for measure, value, limit in (("time", "step", MAX_TIME_SLOPE), ("memory", "allocated", MAX_MEMORY_SLOPE)):
            slopes = [slope_of(results, sweep, contender, value) for sweep in SWEEPS]
            found.append(Bar.of(f"{contender}: slopes of {measure}", "≤", limit, slopes, ".2f"))
    device = results.machine["device"]
    name = name_of(AUTO[device])
    parts = _of_growth, _of_shares, _on_gpu if device == "cuda" else _on_cpu
    claims = [claim for part in parts for claim in part(results, name)]
    return [*found, *(Bar.of(name + claim, *rest) for claim, *rest in claims)]


def _of_growth(results: Results, name: str) -> Iterator[Any]:
    def known(contender: str, value: str, size: int = COMPARED_AT) -> Any:
        return dict(growth.history(results, LINEAR, "H*W", contender, value)).get(size)

    # as they were taken in turn
    faster = known("dense", "ratio") if name == here(results)[0] else None
    own, dense = known(name, "allocated"), known("dense", "allocated")
    at = f"than dense alignment at {COMPARED_AT:,} patches"
    yield f": faster {at}", "≥", 1000, [faster], ",.0f", "x"
    yield f": less memory {at}", "≥", 500, [dense / own if own and dense else None], ",.0f", "x"
    cap, step = results.settings["time_cap"], known(name, "step", LONG_CLIP)
    yield f": {LONG_CLIP:,} patches in one clip", "≤", cap, [step], ".3f", " s"


def _of_shares(results: Results, name: str) -> Iterator[Any]:
    on_cpu = results.machine["device"] == "cpu"
    limits = [(case, "", 0.005 if on_cpu else 0.01) for case in PUBLISHED]
    limits += [(training_step.EXAMPLE, how, 0.01) for how in ("", TWO_THREADS)[: 1 + on_cpu]]
    for case, how, limit in limits:
        rows = results.select(training_step.SUITE, case=case, contender=name + how)
        yield f"{how}: share of a training step, {case}", "<", limit, _values(rows, "share"), ".2%"


def steps(results: Results, contender: str, clips: int, dtype: str = "float32") -> list[Row]:
    """Return the rows of a MOVi-C step, of a number of clips."""
    rows = results.select(kernels.SUITE, case=STEP, contender=contender, dtype=dtype)
    return [row for row in rows if row.key.sizes == {"B": clips, **kernels.MOVI_C}]


def _values(rows: Iterable[Row], name: str) -> list[float | Spread]:
    return [row.values[name] for row in rows if name in row.values]


def _on_cpu(results: Results, name: str) -> Iterator[Any]:
    for clips, limit in ((4, 3.5), (kernels.BATCH, 3.2)):
        ratio = _values(steps(results, name, clips), "over_exp")
        yield f": step over `torch.exp`, {clips} clips of MOVi-C", "≤", limit, ratio, ".1f"
    speedup = _values(steps(results, name + TWO_THREADS, kernels.BATCH), "speedup")
    yield f": faster on two threads, {kernels.BATCH} clips", "≥", 1.7, speedup, ".2f", "x"
    waiting = [one for clips in (4, kernels.BATCH) for one in _values(steps(results, name, clips), "maps_waiting")]
    yield ": maps kept for the backward, beyond inputs and gradients", "≤", 0.1, waiting, ".2f"
    first = _values(results.select(kernels.SUITE, case=kernels.FIRST_USE), "step")
    yield ": first use, import and compiler included", "≤", 3.0, first, ".1f", " s"


def _on_gpu(results: Results, name: str) -> Iterator[Any]:
    launches = _values(results.select(kernels.SUITE, case=STEP, contender=name), "launches")
    yield ": launches of a step", "≤", 9, launches, ".0f"
    replayed = _values(steps(results, name + REPLAY, kernels.BATCH, "float16"), "step")
    yield f": replayed step, MOVi-C, {kernels.BATCH} clips, float16", "≤", 60e-6, replayed, ".6f", " s"
    replays = results.select(kernels.SUITE, case=STEP, contender=name + REPLAY)
    large = _values([row for row in replays if row.key.sizes["B"] > kernels.BATCH], "over_floor")
    yield ": replayed step over its bandwidth floor, large maps", "≤", 1.5, large, ".2f"
