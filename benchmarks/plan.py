"""What was asked for, what is measured together, and the run that writes every row down as soon as there is one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    # without threads, as many as were asked for
    threads: int | None = None
    # see Limits
    raised: bool = False
    alone: bool = False
    # why a row may not be measured, and why it must not have what was
    stop: Callable[[Results, Key, Options], Stop | None] = lambda *_: None
    check: Callable[[Results, Key, Values], Stop | None] = lambda *_: None


def do(job: Job, results: Results, options: Options) -> None:
    """Measure what is missing of a job, and write every row down."""
    able = []
    for key in job.rows:
        row = results.rows.get(key)
        if row is not None and (row.status != "measured" or job.value in ("", *row.values)):
            continue
        stop = _stopped(results, key) or job.stop(results, key, options)
        if stop is None:
            able.append(key)
        else:
            results.add([Row(key, *stop)])
    if not able:
        return
    on_cpu = options.device == "cpu"
    limits = Limits(
        threads=job.threads or options.threads,
        memory=options.memory_cap if on_cpu else None,
        raised=job.raised and on_cpu,
        # a process that has asked for a GPU cannot fork any more
        alone=job.alone or not on_cpu,
    )
    status, note, found = child.call(job.measure, able, options, limits=limits)
    rows = []
    for key, values in zip(able, found or [{}] * len(able), strict=True):
        stop = job.check(results, key, values) if status == "measured" else (status, note)
        rows.append(Row(key, values=values) if stop is None else Row(key, *stop))
    results.add(rows)


def _stopped(results: Results, key: Key) -> Stop | None:
    """Say why a contender was stopped at the gate, in any dtype, or at the same place, measured otherwise."""
    base = base_of(key.contender)
    gates = results.select("gate", contender=base) if key.suite != "gate" else []
    usual = results.rows.get(key._replace(contender=base))
    for row in [*gates, *([usual] if usual else [])]:
        if row.status != "measured":
            return row.status, row.note
    return None
