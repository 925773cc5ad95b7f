"""Timing several things in turn, so that whatever slows the machine down slows all of them."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch

from benchmarks.results import Spread, Value

WARM_UPS = 2
# a second call of something this slow warms nothing up
SLOW_SECONDS = 2.0
MIN_ROUNDS, MAX_ROUNDS = 3, 20
MAX_CALLS = 10
# a round gives everyone about this long, or one call
TURN_SECONDS = 0.05

# calls the function it is given before, between and after its parts, and returns the marks
Work: TypeAlias = Callable[[Callable[[], Any]], Sequence[Any]]


class Clock(Protocol):
    """Takes marks and says, after waiting, how far apart they are."""

    def mark(self) -> Any:
        """Take a mark."""

    def wait(self) -> None:
        """Wait until all marks are in the past."""

    def seconds(self, before: Any, after: Any) -> float:
        """Say how much time passed between two marks."""


class CpuClock:
    """The clock of a CPU, where a call ends when its work does."""

    def mark(self) -> float:
        """Take a mark."""
        return time.perf_counter()

    def wait(self) -> None:
        """There is nothing to wait for."""

    def seconds(self, before: float, after: float) -> float:
        """Subtract."""
        return after - before


class CudaClock:
    """Events in the GPU's own stream: calls follow each other as they do in training, without waiting in between."""

    def mark(self) -> torch.cuda.Event:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize()

    def seconds(self, before: torch.cuda.Event, after: torch.cuda.Event) -> float:
        """Ask the device."""
        milliseconds: float = before.elapsed_time(after)
        return milliseconds / 1e3


def clock_of(device: str) -> Clock:
    """Return the clock of a device."""
    return CudaClock() if device == "cuda" else CpuClock()


class Samples(NamedTuple):
    """What was measured of one contender: rounds of calls of parts, in seconds."""

    rounds: list[list[list[float]]]

    def part(self, number: int) -> Spread:
        """Summarize one part over all calls."""
        return Spread.of([call[number] for calls in self.rounds for call in calls])

    def whole(self) -> Spread:
        """Summarize the sum of all parts."""
        return Spread.of([sum(call) for calls in self.rounds for call in calls])

    def per_round(self) -> list[float]:
        """Return the median of every round."""
        return [Spread.of([sum(call) for call in calls]).median for calls in self.rounds]

    def over(self, other: "Samples") -> Spread:
        """Summarize how many times the other's time this takes, round by round."""
        return Spread.of([own / its for own, its in zip(self.per_round(), other.per_round(), strict=True)])

    def values(self, parts: Sequence[str]) -> dict[str, Value]:
        """Name the parts, where there is more than one, and the whole."""
        named: dict[str, Value] = {}
        if len(parts) > 1:
            named = {name: self.part(number) for number, name in enumerate(parts)}
        return named | {"step": self.whole()}


def interleave(
    works: Mapping[str, Work],
    clock: Clock,
    *,
    budget: float,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
) -> dict[str, Samples]:
    """Warm everything up, then let all take turns, round after round.

    Args:
        works: what to time, by name.
        clock: what to time it with.
        budget: seconds that the rounds may take together, unless that is less than `min_rounds` of them.
        min_rounds: number of rounds at least.
        max_rounds: number of rounds at most.
    """
    cost = {name: _warm_up(work, clock) for name, work in works.items()}
    calls = {name: min(max(int(TURN_SECONDS / max(one, 1e-9)), 1), MAX_CALLS) for name, one in cost.items()}
    round_seconds = sum(cost[name] * calls[name] for name in works)
    num_rounds = min(max(int(budget / max(round_seconds, 1e-9)), min_rounds), max_rounds)
    samples: dict[str, Samples] = {name: Samples([]) for name in works}
    gc.collect()
    gc.disable()
    try:
        for _ in range(num_rounds):
            for name, work in works.items():
                marks = [work(clock.mark) for _ in range(calls[name])]
                clock.wait()
                samples[name].rounds.append([_between(one, clock) for one in marks])
    finally:
        gc.enable()
    return samples


def _warm_up(work: Work, clock: Clock) -> float:
    """Call a work until it is warm; return the seconds of the last call."""
    seconds = 0.0
    for _ in range(WARM_UPS):
        marks = work(clock.mark)
        clock.wait()
        seconds = sum(_between(marks, clock))
        if seconds > SLOW_SECONDS:
            break
    return seconds


def _between(marks: Sequence[Any], clock: Clock) -> list[float]:
    return [clock.seconds(before, after) for before, after in pairwise(marks)]
