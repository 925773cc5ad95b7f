"""Results as a machine with known costs would give them: for tests of what is made of results."""

from pathlib import Path
from typing import Any

import pytest
from benchmarks import run
from benchmarks.add_ons import BY_NAME
from benchmarks.child import Outcome, Worker
from benchmarks.contenders import CONTENDERS, PARTS
from benchmarks.results import Results, Spread, Value, values_to_json
from benchmarks.session import Options, Session
from benchmarks.suites import add_ons, kernels, linear_vs_quadratic

ENVIRONMENT: dict[str, Any] = {
    "device": "cpu",
    "cpu": "Abacus",
    "cores": 2,
    "memory_gb": 16,
    "gpu": None,
    "cuda": None,
    "system": "Linux",
    "python": "3.11",
    "torch": "2.13",
    "triton": None,
    "commit": "abcdef0123",
    "dirty": False,
    "sources": "0123456789ab",
    "date": "2026-11-20T12:00:00+00:00",
}


def options(**changes: Any) -> Options:
    chosen: dict[str, Any] = {
        "suites": run.SUITES,
        "device": "cpu",
        "backends": ("cpu", "torch"),
        "quick": False,
        "time_cap": 10.0,
        "memory_cap": 12_000_000_000,
        "threads": 1,
    }
    return Options(**chosen | changes)


def spread(value: float, noise: float = 0.0) -> Spread:
    return Spread(value, value * (1 - noise / 2), value * (1 + noise / 2), 5)


class Machine:
    """Answers every job with costs that follow a rule, and remembers what it was asked."""

    def __init__(self, *, noise: float = 0.0, wrong: str = "", loss_of: dict[str, float] | None = None) -> None:
        self.asked: list[str] = []
        self.noise = noise
        self.wrong = wrong
        self.loss_of = loss_of or {}
        # raise Ctrl-C instead of answering the n-th job
        self.stop_at = 0

    def seconds(self, contender: str, shape: dict[str, int]) -> float:
        """Return a microsecond a patch for SSync, 10 ns a pair for dense alignment, and what add-ons should take."""
        if contender in BY_NAME:
            one = BY_NAME[contender]
            return float(1e-7 * add_ons.size_of(one.axis, shape) ** one.time)
        patches, window = self._size(contender, shape)
        return 1e-6 * patches if window is None else 1e-8 * patches * window

    def bytes(self, contender: str, shape: dict[str, int]) -> int:
        """Return 100 bytes a patch for SSync, 16 a pair that is held for dense alignment; add-ons may hold nothing."""
        if contender in BY_NAME:
            one = BY_NAME[contender]
            return 8 * add_ons.size_of(one.axis, shape) ** one.memory if one.memory else 0
        patches, window = self._size(contender, shape)
        if window is None:
            return 100 * patches
        return 16 * (min(1024, patches) if "chunked" in contender else patches) * window

    def _size(self, contender: str, shape: dict[str, int]) -> tuple[int, int | None]:
        one = CONTENDERS[contender]
        if one.backend is not None:
            return linear_vs_quadratic.num_patches(shape), None
        frames = one.group_frames or shape["T"]
        return linear_vs_quadratic.num_patches(shape), frames * shape["H"] * shape["W"]

    def call(self, function: str, **arguments: Any) -> Outcome:
        self.asked.append(function)
        if len(self.asked) == self.stop_at:
            raise KeyboardInterrupt
        name = function.split(":")[1]
        answer: Any = getattr(self, name)(**{k: v for k, v in arguments.items() if k not in ("plain", "threads")})
        return Outcome("measured", "", answer)

    def available(self, backend: str, **_: Any) -> str:
        return "" if backend != "triton" else "it is not there"

    def gate(self, contender: str, **_: Any) -> str:
        return "the loss is another" if contender == self.wrong else ""

    def gate_add_on(self, contender: str, **_: Any) -> str:
        return self.gate(contender)

    def measure_times(self, contenders: list[str], shape: dict[str, int], **_: Any) -> dict[str, Any]:
        base = self.seconds(contenders[0], shape)
        return {name: self._times(name, shape, base) for name in contenders}

    def _times(self, name: str, shape: dict[str, int], base: float) -> dict[str, Any]:
        seconds = self.seconds(name, shape)
        parts = {part: spread(seconds / 2) for part in PARTS}
        return values_to_json({**parts, "step": spread(seconds, self.noise), "ratio": spread(seconds / base)})

    def measure_memory(self, contender: str, shape: dict[str, int], **_: Any) -> dict[str, Any]:
        allocated = self.bytes(contender, shape)
        values: dict[str, float] = {"allocated": allocated, "resident": allocated + 10_000_000}
        values |= {"maps_beyond_gradients": 0.5, "maps_waiting": 0.05}
        return values | {"loss": self.loss_of.get(contender, 1.0)}

    def try_step(self, **_: Any) -> dict[str, float]:
        return {"seconds": 3.0, "bytes": 1e8}

    def measure(self, shape: dict[str, int], **_: Any) -> dict[str, Any]:
        parts = {"without": spread(1.0), "with": spread(1.01), "alone": spread(0.002)}
        return values_to_json({**parts, "share": spread(0.002), "difference": spread(0.01), "batch": shape["B"]})

    def count_all(self, shape: dict[str, int], contenders: list[str], **_: Any) -> dict[str, Any]:
        # operators of a compiled step cannot be counted
        assert not any(CONTENDERS[name].compiled for name in contenders)
        workload = kernels.Workload(shape, "float32", False)
        return {
            f"{case} / {name}": {"launches": 9, "host_reads": 0}
            for case, name in kernels.names(workload, contenders, "cpu")
        }

    def time_all(self, shape: dict[str, int], contenders: list[str], **_: Any) -> dict[str, Any]:
        workload = kernels.Workload(shape, "float32", False)
        one: dict[str, Value] = {"step": spread(1e-3), "bytes": 10, "over_floor": spread(2.0), "over_exp": spread(3.1)}
        one["speedup"] = spread(1.9)
        times = {f"{case} / {name}": one for case, name in kernels.names(workload, contenders, "cpu")}
        times["copy / torch"] = {"step": spread(1e-2), "bytes": 10, "bandwidth": 2e10}
        times["exp of both maps / torch"] = {"step": spread(1e-3)}
        return {name: values_to_json(values) for name, values in times.items()}

    def time_first_use(self, times: int) -> dict[str, Any]:
        return values_to_json({"step": spread(0.5 * times)})


def measured(patch: pytest.MonkeyPatch, machine: Machine | None = None, **changes: Any) -> Results:
    """Run the suites on such a machine, from the start and without a file."""
    chosen = options(**changes)
    return go_on(patch, chosen, machine or Machine(), fresh(chosen))


def go_on(monkeypatch: pytest.MonkeyPatch, chosen: Options, machine: Machine, results: Results) -> Results:
    """Run the suites on such a machine from where the results are."""
    monkeypatch.setattr(Worker, "call", lambda _, function, **arguments: machine.call(function, **arguments))
    session = Session(chosen, results)
    session.run(run.plan(chosen))
    return results


def fresh(chosen: Options, path: Path | None = None) -> Results:
    return Results(dict(ENVIRONMENT), chosen.settings(), path=path)
