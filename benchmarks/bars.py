"""The bars: limits that the results of a machine must meet."""

from collections.abc import Iterator, Sequence
from operator import ge, le, lt
from typing import Any, NamedTuple

from benchmarks.add_ons import BY_NAME
from benchmarks.contenders import AUTO, REPLAY, STEP, TWO_THREADS, name_of
from benchmarks.results import Results, Row, Spread
from benchmarks.suites import growth, kernels, training_step
from benchmarks.suites.growth import LINEAR

SWEEPS = ("H*W", "T", "B")
# slopes are fitted from these patches on. Below, the cost of calls lowers a slope
FIT_FROM = {"cpu": {"SSync": 65_536, "dense": 1024}, "cuda": {"SSync": 1_048_576, "dense": 4096}}
MAX_TIME_SLOPE, MAX_MEMORY_SLOPE = 1.15, 1.05
COMPARED_AT, LONG_CLIP = 16_384, 1_048_576

MET, MISSED, NOT_MEASURED = "met", "**missed**", "**not measured**"
COMPARE = {"<": lt, "≤": le, "≥": ge}
Measured = Sequence[float | Spread | None]


class Bar(NamedTuple):
    """A claim, its limit, the measurements, and the verdict."""

    claim: str
    limit: str
    measured: str
    verdict: str

    @classmethod
    def of(cls, claim: str, sign: str, limit: float, values: Measured, form: str, unit: str = "") -> "Bar":
        """Compare medians with a limit. Quartiles are shown where they differ from the median."""
        spreads = [one if isinstance(one, Spread) else Spread(one, one, one, 1) for one in values if one is not None]
        said = []
        for spread in spreads:
            text, *quartiles = (f"{one:{form}}{unit}" for one in spread[:3])
            said.append(text if {*quartiles} == {text} else f"{text} ({' to '.join(quartiles)})")
        verdict = MET if len(said) == len(values) > 0 else NOT_MEASURED
        if not all(COMPARE[sign](one.median, limit) for one in spreads):
            verdict = MISSED
        return cls(claim, f"{sign} {limit:{form}}{unit}", ", ".join(said) or "-", verdict)


def summary(found: Sequence[Bar]) -> str:
    """Count the bars that are not met."""
    counts = {one: sum(bar.verdict == one for bar in found) for one in (MISSED, NOT_MEASURED)}
    parts = [f"{count} {one}" for one, count in counts.items() if count]
    return f"Of {len(found)}: {', '.join(parts)}." if parts else f"All {len(found)} are met."


def here(results: Results) -> list[str]:
    """Return SSync by all measured backends, the fastest first."""
    return [name_of(one) for one in results.origin["backends"]]


def slope_of(results: Results, sweep: str, contender: str, value: str) -> float | None:
    """Fit the slope of a contender's ``"step"`` or ``"allocated"`` in a sweep, from `FIT_FROM` on."""
    start = FIT_FROM[results.origin["device"]]["dense" if contender in BY_NAME else "SSync"]
    points = growth.history(results, LINEAR, sweep, contender, value)
    return growth.slope([point for point in points if point[0] >= start])


def bars(results: Results) -> list[Bar]:
    """Compare the slopes of all backends, and everything else of the backend that ``"auto"`` prefers."""
    found = []
    for contender in here(results):
        for measure, value, limit in (("time", "step", MAX_TIME_SLOPE), ("memory", "allocated", MAX_MEMORY_SLOPE)):
            slopes = [slope_of(results, sweep, contender, value) for sweep in SWEEPS]
            found.append(Bar.of(f"{contender}: slopes of {measure}", "≤", limit, slopes, ".2f"))
    device = results.origin["device"]
    name = name_of(AUTO[device])
    parts = _of_growth, _of_shares, _on_gpu if device == "cuda" else _on_cpu
    return [*found, *(Bar.of(name + claim, *rest) for part in parts for claim, *rest in part(results, name))]


def _of_growth(results: Results, name: str) -> Iterator[Any]:
    def known(contender: str, value: str, size: int = COMPARED_AT) -> Any:
        return dict(growth.history(results, LINEAR, "H*W", contender, value)).get(size)

    # ratios are to the first contender
    faster = known("dense", "ratio") if name == here(results)[0] else None
    own, dense = known(name, "allocated"), known("dense", "allocated")
    at = f"than dense alignment at {COMPARED_AT:,} patches"
    yield f": faster {at}", "≥", 1000, [faster], ",.0f", "x"
    yield f": less memory {at}", "≥", 500, [dense / own if own and dense else None], ",.0f", "x"
    cap, step = results.origin["time_cap"], known(name, "step", LONG_CLIP)
    yield f": {LONG_CLIP:,} patches in one clip", "≤", cap, [step], ".3f", " s"


def _of_shares(results: Results, name: str) -> Iterator[Any]:
    on_cpu = results.origin["device"] == "cpu"
    limits = [(case, "", 0.005 if on_cpu else 0.01) for case in training_step.PUBLISHED]
    limits += [(training_step.EXAMPLE, how, 0.01) for how in ("", TWO_THREADS)[: 1 + on_cpu]]
    for case, how, limit in limits:
        shares = _values(results.select(training_step.SUITE, case=case, contender=name + how), "alone_over_with")
        yield f"{how}: share of a training step, {case}", "<", limit, shares, ".2%"


def _on_cpu(results: Results, name: str) -> Iterator[Any]:
    for clips, limit in ((4, 3.5), (kernels.BATCH, 3.2)):
        ratio = of_steps(results, name, "over_exp", clips)
        yield f": step over `torch.exp`, {clips} clips of MOVi-C", "≤", limit, ratio, ".1f"
    speedup = of_steps(results, name + TWO_THREADS, "speedup")
    yield f": faster on two threads, {kernels.BATCH} clips", "≥", 1.7, speedup, ".2f", "x"
    waiting = [one for clips in (4, kernels.BATCH) for one in of_steps(results, name, "maps_waiting", clips)]
    yield ": maps kept for the backward, beyond inputs and gradients", "≤", 0.1, waiting, ".2f"
    first = _values(results.select(kernels.SUITE, case=kernels.FIRST_USE), "step")
    yield ": first use, import and compiler included", "≤", 3.0, first, ".1f", " s"


def _on_gpu(results: Results, name: str) -> Iterator[Any]:
    launches = _values(results.select(kernels.SUITE, case=STEP, contender=name), "launches")
    yield ": launches of a step", "≤", 9, launches, ".0f"
    replayed = of_steps(results, name + REPLAY, "step", dtype="float16")
    yield f": replayed step, MOVi-C, {kernels.BATCH} clips, float16", "≤", 60e-6, replayed, ".6f", " s"
    replays = results.select(kernels.SUITE, case=STEP, contender=name + REPLAY)
    large = _values([row for row in replays if row.key.sizes["B"] > kernels.BATCH], "over_floor")
    yield ": replayed step over its bandwidth floor, large maps", "≤", 1.5, large, ".2f"


def of_steps(
    results: Results, contender: str, value: str, clips: int = kernels.BATCH, dtype: str = "float32"
) -> list[float | Spread]:
    """Return a value of a MOVi-C step with this number of clips."""
    rows = results.select(kernels.SUITE, case=STEP, contender=contender, dtype=dtype)
    return _values([row for row in rows if row.key.sizes == {"B": clips, **kernels.MOVI_C}], value)


def _values(rows: Sequence[Row], name: str) -> list[float | Spread]:
    return [row.values[name] for row in rows if name in row.values]
