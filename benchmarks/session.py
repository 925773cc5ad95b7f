"""A run in progress: its options, its workers, and the file that every row goes to at once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.child import Outcome, Worker
from benchmarks.environment import RAISED_ALLOCATOR
from benchmarks.results import Results, Row, RowId, Value, values_from_json


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
        suites: which suites to run.
        device: ``"cpu"`` or ``"cuda"``.
        backends: of SSync, those that can be had here.
        quick: a rehearsal of everything in less than two minutes.
        time_cap: seconds; a step that should take longer is not run.
        memory_cap: bytes; a step that should take more is not run.
        threads: of torch; the suite of kernels always takes one.
    """

    suites: tuple[str, ...]
    device: str
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
        """Return what a result depends on."""
        return {
            "quick": self.quick,
            "threads": self.threads,
            "time_cap": self.time_cap,
            "memory_cap": self.memory_cap,
            "allocator": dict(RAISED_ALLOCATOR) if self.device == "cpu" else {},
            "backends": list(self.backends),
        }


class Task(NamedTuple):
    """Rows that are measured together, and how."""

    rows: list[RowId]
    run: Callable[["Session"], None]


class Session:
    """Runs tasks, and writes every row as soon as there is one."""

    def __init__(self, options: Options, results: Results, *, bar: "tqdm[Any] | None" = None) -> None:
        self.options = options
        self.results = results
        limits: dict[str, Any] = {
            "device": options.device,
            "threads": options.threads,
            "memory_cap": options.memory_cap,
        }
        self._raised = Worker(RAISED_ALLOCATOR if options.device == "cpu" else {}, **limits)
        self._plain = Worker({}, **limits)
        self._bar = bar

    def call(self, function: str, *, plain: bool = False, **how: Any) -> Outcome:
        """Run a function in a fresh process, with a raised or with the usual malloc, as :class:`Worker` does."""
        worker = self._plain if plain else self._raised
        return worker.call(function, **how)

    def missing(self, rows: Iterable[RowId]) -> list[RowId]:
        """Return the rows that are not in the file."""
        return [row for row in rows if row not in self.results.rows]

    def stopped_at_gate(self, contender: str) -> Outcome | None:
        """Return how a contender failed at the gate, in any dtype, or None: then it may be measured."""
        for row in self.results.select(suite="gate", contender=contender):
            if row.status != "measured":
                return Outcome(row.status, row.note, None)
        return None

    def row(self, key: RowId, outcome: Outcome) -> Row:
        """Make a row of an outcome whose value is the row's."""
        values: Mapping[str, Value] = values_from_json(outcome.value) if outcome.status == "measured" else {}
        return Row(key, outcome.status, outcome.note, values)

    def add(self, *rows: Row) -> None:
        """Write rows down."""
        if rows:
            self.results.add(rows)
            if self._bar is not None:
                self._bar.update(len(rows))

    def run(self, tasks: Sequence[Task]) -> None:
        """Run the tasks that have rows missing."""
        for task in tasks:
            missing = self.missing(task.rows)
            if missing:
                if self._bar is not None:
                    self._bar.set_postfix_str(f"{missing[0].case}, {missing[0].contender}", refresh=True)
                task.run(self)

    def start(self) -> None:
        """Let the workers start side by side."""
        self._raised.start()
        self._plain.start()

    def close(self) -> None:
        """End the workers."""
        self._raised.close()
        self._plain.close()
