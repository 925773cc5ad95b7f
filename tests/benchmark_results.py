"""The results of a machine with known costs, for tests of tables and commands."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from benchmarks import plan, run
from benchmarks.add_ons import BY_NAME
from benchmarks.contenders import base_of
from benchmarks.plan import Job, Options
from benchmarks.results import SUITES, Key, Results, Row, Spread, Values
from benchmarks.suites import growth


def options(**changes: Any) -> Options:
    chosen: dict[str, Any] = {"suites": SUITES[1:], "device": "cpu", "backends": ("cpu", "torch"), "quick": False}
    return Options(**chosen | {"time_cap": 10.0, "memory_cap": 12_000_000_000, "threads": 1} | changes)


def origin(chosen: Options | None = None, **changes: Any) -> dict[str, Any]:
    words = dict.fromkeys(("cpu", "system", "python", "torch", "commit", "sources", "date"), "Abacus")
    return run.origin(chosen or options()) | words | changes


def spread(value: float) -> Spread:
    return Spread(value, value, value, 5)


def cost(key: Key, per_patch: float, per_pair: float, power: str, per_size: float) -> float:
    """Let SSync grow with the patches, dense alignment with their pairs, and add-ons as they should."""
    patches = key.sizes["H"] * key.sizes["W"]
    if key.contender.startswith("dense"):
        window = int(key.contender[-1]) if "windows" in key.contender else key.sizes["T"]
        return per_pair * growth.size_of(key) * window * patches
    if key.contender in BY_NAME:
        return float(per_size * growth.size_of(key) ** getattr(BY_NAME[key.contender], power))
    return per_patch * key.sizes["B"] * key.sizes["T"] * patches


def values_of(key: Key) -> Values:
    """Measure a microsecond a patch for SSync, 10 ns a pair for dense alignment, 0.1 us a size for add-ons."""
    if key.suite == "gate":
        return {}
    if key.suite == "training_step":
        return {"with": spread(1.01), "alone_over_with": spread(0.002)}
    held: dict[str, Any] = {"allocated": int(cost(key, 100, 16, "memory", 8))}
    if key.suite == "kernels":
        counted = {"launches": 9, "maps_beyond_gradients": 0.5, "maps_waiting": 0.05, "speedup": spread(1.9)}
        step = spread(2.5 if key.case.startswith("first") else 1e-3)
        return {"step": step, "over_floor": spread(2.0), "over_exp": spread(3.1), **held, **counted}
    own, first = (cost(one, 1e-6, 1e-8, "time", 1e-7) for one in (key, key._replace(contender="SSync cpu")))
    ratio = {"ratio": spread(own / first)} if base_of(key.contender) == key.contender else {}
    return {"step": spread(own), **held, **ratio}


@dataclass
class Machine:
    """Measures jobs by a rule. `refused` are rows without values; Ctrl-C comes instead of the job `stop_at`."""

    refused: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    jobs: int = 0
    stop_at: int = 0

    def work(self, _: Job, keys: list[Key], __: Options) -> list[Row]:
        self.jobs += 1
        if self.jobs == self.stop_at:
            raise KeyboardInterrupt
        refused = {key: self.refused.get((key.suite, key.contender)) for key in keys}
        return [Row(key, *no) if no else Row(key, values=values_of(key)) for key, no in refused.items()]


def measured(patch: pytest.MonkeyPatch, machine: Machine | None = None, **changes: Any) -> Results:
    """Run the suites on such a machine, without a file."""
    chosen = options(**changes)
    results = Results(origin(chosen))
    patch.setattr(plan, "work", (machine or Machine()).work)
    for job in run.plan(chosen):
        plan.do(job, results, chosen)
    return results
