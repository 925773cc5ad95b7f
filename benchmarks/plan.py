"""The options of a run, the jobs that it plans, and the work on one job."""

import ctypes
import gc
import resource
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.contenders import base_of
from benchmarks.results import Key, Results, Row

# malloc returns large blocks to the system. Each step then faults its pages in again, which bends the slope of time.
# With these settings of malloc.h, and their numbers there, the process keeps its memory.
RAISED = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 64 << 20)}
OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory", "out of memory", "bad_alloc", "MemoryError")


@dataclass(frozen=True)
class Options:
    """The options of a run. The caps of a step are in seconds and bytes, the backends are those that run here."""

    suites: tuple[str, ...]
    device: str
    backends: tuple[str, ...]
    quick: bool
    time_cap: float
    memory_cap: int
    threads: int

    @property
    def budget(self) -> float:
        """The seconds for the timed rounds of a job."""
        return 0.3 if self.quick else 3.0


class Job(NamedTuple):
    """Rows that are measured together.

    Attributes:
        rows: their keys.
        measure: the function that returns the rows.
        threads: overrides the threads of the options.
        raised: whether malloc keeps memory from this job on.
        stop: returns the row of a contender that must not run, or None.
    """

    rows: list[Key]
    measure: Callable[[Sequence[Key], Options], list[Row]]
    threads: int | None = None
    raised: bool = False
    stop: Callable[[Results, Key, Options], Row | None] = lambda *_: None


class Outcome(NamedTuple):
    """The value of a call that was "measured", or the status and a note."""

    status: str
    note: str = ""
    value: Any = None


def do(job: Job, results: Results, options: Options) -> None:
    """Measure a job if a missing row of it may run. Write its rows, measured or stopped."""
    missing = [key for key in job.rows if key not in results.rows]
    if not missing:
        return
    stopped = {key: _stopped(results, key) or job.stop(results, key, options) for key in job.rows}
    # a ratio needs all rows of its job
    able = [key for key, row in stopped.items() if row is None] if None in map(stopped.get, missing) else []
    rows = [row for key in missing if (row := stopped[key]) is not None]
    results.add([*rows, *(work(job, able, options) if able else [])])


def work(job: Job, keys: list[Key], options: Options) -> list[Row]:
    """Measure rows of a job, with its threads and its malloc."""
    outcome = attempt(_prepared, job, keys, options)
    return outcome.value or [Row(key, outcome.status, outcome.note) for key in keys]


def _prepared(job: Job, keys: list[Key], options: Options) -> list[Row]:
    if job.raised and options.device == "cpu":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
        for name, (number, value) in RAISED.items():
            if mallopt(number, value) != 1:
                raise RuntimeError(f"this malloc has no {name}")
    torch.set_num_threads(job.threads or options.threads)
    # a function is compiled for eight shapes at most
    torch.compiler.reset()
    gc.collect()
    with _capped(options.memory_cap) if options.device == "cpu" else nullcontext():
        return job.measure(keys, options)


@contextmanager
def _capped(extra: int) -> Iterator[None]:
    """Let this process map so many bytes beyond those of its first job, or fewer if the user has a limit."""
    usual, most = resource.getrlimit(resource.RLIMIT_AS)
    limits = [one for one in (usual, most, _mapped() + extra) if one != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (usual, most))


@cache
def _mapped() -> int:
    """Return the bytes that this process has mapped at the first call; without /proc more than any limit."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return 1 << 62


def attempt(function: Callable[..., Any], *arguments: Any) -> Outcome:
    """Call a function. An error becomes a status and a note."""
    try:
        return Outcome("measured", value=function(*arguments))
    except AssertionError as error:
        return Outcome("wrong", " ".join(str(error).split())[:500] or "disagrees with the reference")
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
        if isinstance(error, MemoryError) or any(sign in said for sign in OUT_OF_MEMORY):
            return Outcome("memory", said)
        traceback.print_exc()
        return Outcome("failed", said)


def _stopped(results: Results, key: Key) -> Row | None:
    """Return a row for a contender that failed the gate in any dtype, or did not run without its suffix."""
    base = base_of(key.contender)
    gates = results.select("gate", contender=base) if key.suite != "gate" else []
    for row in [*gates, results.rows.get(key._replace(contender=base))]:
        if row is not None and row.status != "measured":
            return Row(key, row.status, row.note)
    return None
