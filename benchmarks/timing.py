"""Timing several things in turn, so that whatever slows the machine down slows all of them."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch

from benchmarks.results import Spread

WARM_UPS = 2
# a second call of something this slow warms nothing up
SLOW_SECONDS = 2.0
MIN_ROUNDS, MAX_ROUNDS = 3, 20
MAX_CALLS = 10
# a round gives everyone about this long, or one call
TURN_SECONDS = 0.05

# calls the function it is given before, between and after its parts, and returns the marks
Work: TypeAlias = Callable[[Callable[[], Any]], Sequence[Any]]
Name = TypeVar("Name")


class Clock:
    """Takes marks and says, after waiting, how far apart they are: on a CPU, where a call ends when its work does."""

    def mark(self) -> Any:
        """Take a mark."""
        return time.perf_counter()

    def wait(self) -> None:
        """Wait until all marks are in the past."""

    def seconds(self, before: Any, after: Any) -> float:
        """Say how much time passed between two marks."""
        return float(after - before)

    def parts(self, work: Work, calls: int) -> list[list[float]]:
        """Call a work so many times; return the seconds of its parts, call by call."""
        marks = [work(self.mark) for _ in range(calls)]
        self.wait()
        return [[self.seconds(before, after) for before, after in pairwise(one)] for one in marks]


class CudaClock(Clock):
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
        return float(before.elapsed_time(after)) / 1e3


def clock_of(device: str) -> Clock:
    """Return the clock of a device."""
    return CudaClock() if device == "cuda" else Clock()


class Samples(NamedTuple):
    """What was measured of one contender: rounds of calls of parts, in seconds."""

    rounds: list[list[list[float]]]

    def per_round(self) -> list[float]:
        """Return the median of every round."""
        return [Spread.of([sum(call) for call in calls]).median for calls in self.rounds]

    def over(self, other: "Samples", factor: float = 1.0) -> Spread:
        """Summarize how many times the other's time this takes, round by round, times a factor."""
        return Spread.of([own / its for own, its in zip(self.per_round(), other.per_round(), strict=True)], factor)

    def values(self, *parts: str) -> dict[str, float | Spread]:
        """Summarize the whole over all calls, and the parts that have a name."""
        calls = [call for calls in self.rounds for call in calls]
        named = {name: Spread.of([call[number] for call in calls]) for number, name in enumerate(parts)}
        return {**named, "step": Spread.of([sum(call) for call in calls])}


def interleave(works: Mapping[Name, Work], clock: Clock, budget: float) -> dict[Name, Samples]:
    """Warm everything up, then let all take turns, round after round.

    Args:
        works: what to time, by name.
        clock: what to time it with.
        budget: seconds that the rounds may take together, unless that is less than `MIN_ROUNDS` of them.
    """
    cost = {name: _warm_up(work, clock) for name, work in works.items()}
    calls = {name: min(max(int(TURN_SECONDS / max(one, 1e-9)), 1), MAX_CALLS) for name, one in cost.items()}
    round_seconds = sum(cost[name] * calls[name] for name in works)
    samples = {name: Samples([]) for name in works}
    gc.collect()
    gc.disable()
    try:
        for _ in range(min(max(int(budget / max(round_seconds, 1e-9)), MIN_ROUNDS), MAX_ROUNDS)):
            for name, work in works.items():
                samples[name].rounds.append(clock.parts(work, calls[name]))
    finally:
        gc.enable()
    return samples


def _warm_up(work: Work, clock: Clock) -> float:
    """Call a work until it is warm; return the seconds of the last call."""
    seconds = 0.0
    for _ in range(WARM_UPS):
        if seconds <= SLOW_SECONDS:
            seconds = sum(clock.parts(work, 1)[0])
    return seconds
