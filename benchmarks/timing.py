"""Timing several things in turn, so that whatever slows the machine down slows all of them."""

import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple, TypeVar

import torch

from benchmarks.results import Spread

WARM_UPS = 2
# a second call of something this slow warms nothing up
SLOW_SECONDS = 2.0
MIN_ROUNDS, MAX_ROUNDS = 3, 20
MAX_CALLS = 10
# a round gives everyone about this long, or one call
TURN_SECONDS = 0.05

Name = TypeVar("Name")


class Work(NamedTuple):
    """A call, and what has to be done before each and is not timed."""

    call: Callable[[], object]
    before: Callable[[], object] | None = None


def clock_of(device: str) -> Callable[[], float]:
    """Return what reads the time when a device has done its work; on a CPU, a call ends when its work does."""

    def read() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return read if device == "cuda" else time.perf_counter


def interleave(works: Mapping[Name, Work], clock: Callable[[], float], budget: float) -> dict[Name, list[float]]:
    """Warm everything up, then let all take turns; return the seconds of a call, round by round.

    The budget is what the rounds may take together, unless that is less than `MIN_ROUNDS` of them. In a turn, calls
    follow each other without a look at the clock, unless something has to be done before each: then it is their median.
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
    """Summarize how many times the others' time something takes, round by round, times a factor."""
    return Spread.of([factor * own / its for own, its in zip(rounds, others, strict=True)])
