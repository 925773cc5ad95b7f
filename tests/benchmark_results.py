"""Results as a machine with known costs would give them: for tests of what is made of results."""

from collections.abc import Callable
from typing import Any

import pytest
from benchmarks import child, gate, run
from benchmarks.add_ons import BY_NAME
from benchmarks.child import Outcome
from benchmarks.contenders import base_of
from benchmarks.plan import Options, do
from benchmarks.results import SUITES, Key, Results, Spread
from benchmarks.suites import growth

MACHINE: dict[str, Any] = {
    **dict.fromkeys(("cpu", "system", "python", "torch"), "Abacus"),
    **dict.fromkeys(("gpu", "cuda", "triton")),
    "device": "cpu",
    "cores": 2,
    "threads": 1,
    "memory_gb": 16,
    "commit": "abcdef0123",
    "sources": "0123456789ab",
    "date": "2026-11-20T12:00:00+00:00",
}


def options(**changes: Any) -> Options:
    chosen: dict[str, Any] = {"suites": SUITES[1:], "device": "cpu", "backends": ("cpu", "torch"), "quick": False}
    return Options(**chosen | {"time_cap": 10.0, "memory_cap": 12_000_000_000, "threads": 1} | changes)


def spread(value: float) -> Spread:
    return Spread(value, value, value, 5)


def cost(key: Key, per_patch: float, per_pair: float, power: str, per_size: float) -> float:
    """Say what SSync, dense alignment and add-ons cost when they grow as they should."""
    if key.contender.startswith("dense"):
        window = int(key.contender[-1]) if "windows" in key.contender else key.sizes["T"]
        return per_pair * growth.size_of(key) * window * key.sizes["H"] * key.sizes["W"]
    if key.contender in BY_NAME:
        exponent = getattr(BY_NAME[key.contender], power)
        return float(per_size * growth.size_of(key) ** exponent) if exponent or power == "time" else 0.0
    return per_patch * key.sizes["B"] * key.sizes["T"] * key.sizes["H"] * key.sizes["W"]


def seconds(key: Key) -> float:
    """Return a microsecond a patch for SSync, 10 ns a pair for dense alignment, and what add-ons should take."""
    return cost(key, 1e-6, 1e-8, "time", 1e-7)


ALWAYS: dict[str, dict[str, Any]] = {
    "check": {},
    "first_use": {"step": spread(2.5)},
    "counts": {"launches": 9, "host_reads": 0},
    "share": {"with": spread(1.01), "alone": spread(0.002), "share": spread(0.002)},
}


class Machine:
    """Answers every call with values that follow a rule, and remembers what it was asked."""

    def __init__(self, *, wrong: str = "", losses: dict[str, float] | None = None, too_large: str = "") -> None:
        self.asked: list[Any] = []
        self.wrong = wrong
        self.losses = losses or {}
        self.too_large = too_large
        # raise Ctrl-C instead of answering the n-th call
        self.stop_at = 0

    def call(self, function: Callable[..., Any], *given: Any, **_: Any) -> Outcome:
        self.asked.append(function)
        if len(self.asked) == self.stop_at:
            raise KeyboardInterrupt
        if function is gate.missing:
            return Outcome("measured", value="it is not there" if "triton" in given[0] else "")
        keys, _options = given
        if function is gate.check and keys[0].contender == self.wrong:
            return Outcome("wrong", "the loss is another")
        if function.__name__ == "memory" and keys[0].contender == self.too_large:
            return Outcome("memory", "ran out")
        answer = {"memory": self.memory, "times": self.times}.get(function.__name__)
        return Outcome("measured", value=[answer(key) if answer else ALWAYS[function.__name__] for key in keys])

    def memory(self, key: Key) -> dict[str, Any]:
        held = int(cost(key, 100, 16, "memory", 8))
        waiting = {"maps_beyond_gradients": 0.5, "maps_waiting": 0.05} if key.suite == "kernels" else {}
        return {"allocated": held, "loss": self.losses.get(key.contender, 1.0), **waiting}

    def times(self, key: Key) -> dict[str, Any]:
        if key.suite == "kernels":
            return {"step": spread(1e-3), "over_floor": spread(2.0), "over_exp": spread(3.1), "speedup": spread(1.9)}
        ratio = spread(seconds(key) / seconds(key._replace(contender="SSync cpu")))
        return {"step": spread(seconds(key))} | ({"ratio": ratio} if base_of(key.contender) == key.contender else {})


def measured(patch: pytest.MonkeyPatch, machine: Machine | None = None, **changes: Any) -> Results:
    """Run the suites on such a machine, without a file."""
    chosen = options(**changes)
    results = Results(dict(MACHINE), chosen.settings())
    patch.setattr(child, "call", (machine or Machine()).call)
    for job in run.plan(chosen):
        do(job, results, chosen)
    return results
