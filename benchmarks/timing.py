"""Timing in turn: what slows the machine down slows all contenders."""

import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple, TypeVar

import torch

from benchmarks.results import Spread

WARM_UPS = 2
# one call warms up what takes longer
SLOW_SECONDS = 2.0
MIN_ROUNDS, MAX_ROUNDS = 3, 20
MAX_CALLS = 10
# the seconds of a turn, if more than one call fits
TURN_SECONDS = 0.05

Name = TypeVar("Name")


class Work(NamedTuple):
    """A call to time, and what runs before each call, untimed."""

    call: Callable[[], object]
    before: Callable[[], object] | None = None


def clock_of(device: str) -> Callable[[], float]:
    """Return a clock that waits for the device."""

    def read() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return read if device == "cuda" else time.perf_counter


def interleave(works: Mapping[Name, Work], clock: Callable[[], float], budget: float) -> dict[Name, list[float]]:
    """Warm all works up, then let them take turns; return the seconds of a call in each round.

    The rounds fill the budget, within `MIN_ROUNDS` and `MAX_ROUNDS`. A turn times its calls together. If
    something runs before each call, a turn times each call and takes the median.
    """
    timers = {name: timeit.Timer(work.call, work.before or "pass", clock) for name, work in works.items()}
    cost = {name: _warm_up(timer) for name, timer in timers.items()}
    calls = {name: min(max(int(TURN_SECONDS / max(one, 1e-9)), 1), MAX_CALLS) for name, one in cost.items()}
    round_seconds = sum(cost[name] * calls[name] for name in works)
    rounds: dict[Name, list[float]] = {name: [] for name in works}
    for _ in range(min(max(int(budget / max(round_seconds, 1e-9)), MIN_ROUNDS), MAX_ROUNDS)):
        for name, work in works.items():
            number = 1 if work.before else calls[name]
            rounds[name].append(median(timers[name].repeat(calls[name] // number, number)) / number)
    return rounds


def _warm_up(timer: timeit.Timer) -> float:
    """Call a work until it is warm; return the seconds of the last call."""
    seconds = 0.0
    for _ in range(WARM_UPS):
        if seconds <= SLOW_SECONDS:
            seconds = timer.timeit(1)
    return seconds


def over(rounds: Sequence[float], others: Sequence[float], factor: float = 1.0) -> Spread:
    """Divide times round by round; return the spread of the ratios times a factor."""
    return Spread.of([factor * own / its for own, its in zip(rounds, others, strict=True)])
