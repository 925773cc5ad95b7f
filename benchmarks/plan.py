"""What was asked for, what is measured together, and the run that writes every row down as soon as there is one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks import child
from benchmarks.child import RAISED, Limits
from benchmarks.contenders import base_of
from benchmarks.results import Key, Results, Row, Values


@dataclass(frozen=True)
class Options:
    """What was asked for; caps are the seconds and the bytes of a step, and a rehearsal is quick."""

    suites: tuple[str, ...]
    device: str
    # of SSync, those that can be had here
    backends: tuple[str, ...]
    quick: bool
    time_cap: float
    memory_cap: int
    threads: int

    @property
    def budget(self) -> float:
        """Seconds that the timed rounds of things measured together may take."""
        return 0.3 if self.quick else 3.0

    def settings(self) -> dict[str, Any]:
        """Return what a result depends on beside the machine."""
        return {
            "quick": self.quick,
            "time_cap": self.time_cap,
            "memory_cap": self.memory_cap,
            "malloc": dict(RAISED) if self.device == "cpu" else {},
            "backends": list(self.backends),
        }


# the status and the note of a row that has no number
Stop = tuple[str, str]


class Job(NamedTuple):
    """Rows that are measured together, in a process of their own, and the value that each has once that is done."""

    measure: Callable[[Sequence[Key], Options], list[Values]]
    rows: list[Key]
    # of a gate, there is only the row
    value: str = ""
    # as many as were asked for, where nothing is said
    threads: int | None = None
    # see Limits
    raised: bool = False
    alone: bool = False
    # why a row may not be measured, and why it must not have what was
    stop: Callable[[Results, Key, Options], Stop | None] = lambda *_: None
    check: Callable[[Results, Key, Values], Stop | None] = lambda *_: None


class Run:
    """Runs jobs, and writes every row down as soon as there is one."""

    def __init__(self, options: Options, results: Results, bar: "tqdm[Any] | None" = None) -> None:
        self.options = options
        self.results = results
        self.bar = bar

    def missing(self, job: Job) -> list[Key]:
        """Return the rows that are still to be measured."""
        return [key for key in job.rows if self._lacks(key, job.value)]

    def _lacks(self, key: Key, value: str) -> bool:
        row = self.results.rows.get(key)
        return row is None or (row.status == "measured" and value not in ("", *row.values))

    def do(self, job: Job) -> None:
        """Measure what is missing of a job."""
        able = []
        for key in self.missing(job):
            stop = self._stopped(key) or job.stop(self.results, key, self.options)
            if stop is None:
                able.append(key)
            else:
                self.results.add([Row(key, *stop)])
        if not able:
            return
        if self.bar is not None:
            self.bar.set_postfix_str(f"{able[0].case}, {able[0].contender}", refresh=True)
        limits = Limits(
            threads=job.threads or self.options.threads,
            memory=self.options.memory_cap if self.options.device == "cpu" else None,
            raised=job.raised and self.options.device == "cpu",
            # a process that has asked for a GPU cannot fork any more
            alone=job.alone or self.options.device == "cuda",
        )
        outcome = child.call(job.measure, able, self.options, limits=limits)
        if outcome.status == "measured":
            self.results.add(map(self._checked, [job] * len(able), able, outcome.value))
        else:
            self.results.add(Row(key, outcome.status, outcome.note) for key in able)

    def _checked(self, job: Job, key: Key, values: Values) -> Row:
        stop = job.check(self.results, key, values)
        return Row(key, values=values) if stop is None else Row(key, *stop)

    def _stopped(self, key: Key) -> Stop | None:
        """Say why a contender was stopped at the gate, in any dtype, or at the same place, measured otherwise."""
        base = base_of(key.contender)
        for row in self.results.select("gate", contender=base):
            if row.status != "measured" and key.suite != "gate":
                return row.status, row.note
        usual = self.results.rows.get(key._replace(contender=base))
        return (usual.status, usual.note) if usual is not None and usual.status != "measured" else None
