"""One size of a sweep: memory first, a process each, then all in turn against the clock, and where each has to stop."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.child import Outcome
from benchmarks.results import Results, Row, RowId
from benchmarks.session import Session, Task
from benchmarks.slopes import predict

# between losses over millions of patches in different orders; a wrong label or patch moves more
LOSS_RTOL = 1e-4
MEASURES = ("memory", "time")
USUAL_ALLOCATOR = "time, default allocator"


@dataclass(frozen=True)
class Growth:
    """What grows, and how it is measured, in all sweeps of a suite.

    Attributes:
        suite: its name.
        module: where its ``measure_memory`` and ``measure_times`` are.
        dtype: of the inputs.
        size_of: how large a shape is in a sweep.
        unit: what it is counted in, in a sweep.
        same: whether two contenders compute the same loss.
        longest_step: seconds; no step that should take longer, whatever the time cap allows.
        budgets: the budget of a session, so many times, for everyone at a size together.
    """

    suite: str
    module: str
    dtype: str
    size_of: Callable[[str, Mapping[str, int]], int]
    unit: Callable[[str], str]
    same: Callable[[str, str], bool]
    longest_step: float = float("inf")
    budgets: float = 1.0

    def key(self, sweep: str, contender: str, measure: str, shape: Mapping[str, int]) -> RowId:
        """Name a row."""
        return RowId.of(self.suite, sweep, contender, measure, shape, self.dtype)

    def history(
        self, results: Results, sweep: str, contender: str, measure: str, value: str
    ) -> list[tuple[int, float]]:
        """Return what was measured of a contender in a sweep: (size, value), from small to large."""
        rows = results.select(suite=self.suite, case=sweep, contender=contender, measure=measure)
        known = [row for row in rows if row.status == "measured"]
        return sorted((self.size_of(sweep, row.id.sizes), row.number(value)) for row in known)

    def task(
        self, sweep: str, shape: dict[str, int], contenders: Sequence[str], *, usual_allocator: bool = False
    ) -> Task:
        """Plan one size; the first contender is what the others are compared with.

        Args:
            sweep: its name.
            shape: of the inputs.
            contenders: who takes part.
            usual_allocator: whether the first is also timed with malloc as it comes.
        """
        rows = [self.key(sweep, one, measure, shape) for measure in MEASURES for one in contenders]
        if usual_allocator:
            rows.append(self.key(sweep, contenders[0], USUAL_ALLOCATOR, shape))
        return Task(rows, _Size(self, sweep, shape, contenders, rows).run)


@dataclass(frozen=True)
class _Size:
    growth: Growth
    sweep: str
    shape: dict[str, int]
    contenders: Sequence[str]
    rows: list[RowId]

    @property
    def size(self) -> int:
        return self.growth.size_of(self.sweep, self.shape)

    def run(self, session: Session) -> None:
        """Measure what is missing."""
        missing = set(session.missing(self.rows))
        for one in self.contenders:
            key = self._key(one, "memory")
            if key in missing:
                session.add(session.row(key, self._memory(session, one)))
        timed = [one for one in self.contenders if self._key(one, "time") in missing]
        if timed:
            session.add(*self._times(session, timed, "time"))
        if self._key(self.contenders[0], USUAL_ALLOCATOR) in missing:
            session.add(*self._times(session, self.contenders[:1], USUAL_ALLOCATOR))

    def _memory(self, session: Session, contender: str) -> Outcome:
        stopped = session.stopped_at_gate(contender) or self._too_much(session, contender)
        if stopped is not None:
            return stopped
        # the usual malloc: what it keeps to itself is no memory that the loss needs
        outcome = session.call(
            f"{self.growth.module}:measure_memory",
            plain=True,
            contender=contender,
            shape=self.shape,
            device=session.options.device,
        )
        return self._compared(session, contender, outcome)

    def _compared(self, session: Session, contender: str, outcome: Outcome) -> Outcome:
        """Compare the loss with that of the first who computes the same: the gate is small, sizes are not."""
        twin = next(one for one in self.contenders if self.growth.same(one, contender))
        first = session.results.rows.get(self._key(twin, "memory"))
        if outcome.status != "measured" or first is None or first.status != "measured":
            return outcome
        own, expected = outcome.value["loss"], first.number("loss")
        if abs(own - expected) <= LOSS_RTOL * abs(expected):
            return outcome
        return Outcome("wrong", f"the loss is {own:.8g}, and {expected:.8g} by {twin}", None)

    def _too_much(self, session: Session, contender: str) -> Outcome | None:
        """Say what a step should take that may not be taken, going by smaller sizes."""
        options, unit = session.options, self.growth.unit(self.sweep)
        time_cap = min(options.time_cap, self.growth.longest_step)
        for measure, value, cap, said in (
            ("time", "step", time_cap, "s"),
            ("memory", "allocated", options.memory_cap / 1e9, "GB"),
        ):
            costs = self.growth.history(session.results, self.sweep, contender, measure, value)
            # what takes nothing says nothing of what larger sizes take
            known = [(size, cost / (1e9 if said == "GB" else 1)) for size, cost in costs if cost > 0]
            wanted = predict(known, self.size)
            if wanted is not None and wanted > cap:
                size, cost = max(point for point in known if point[0] < self.size)
                note = f"a step should take {_number(wanted)} {said} after {_number(cost)} {said} at {size:,} {unit}"
                return Outcome(measure, f"{note}; the cap is {cap:g} {said}", None)
        return self._stopped_before(session, contender)

    def _stopped_before(self, session: Session, contender: str) -> Outcome | None:
        """Say why a smaller size has no number: then nothing tells what this one would take."""
        rows = session.results.select(suite=self.growth.suite, case=self.sweep, contender=contender, measure="memory")
        for row in rows:
            size = self.growth.size_of(self.sweep, row.id.sizes)
            if row.status != "measured" and size < self.size:
                where = f"as at {size:,} {self.growth.unit(self.sweep)}"
                return Outcome(row.status, row.note if row.note.startswith("as at ") else f"{where}: {row.note}", None)
        return None

    def _times(self, session: Session, timed: Sequence[str], measure: str) -> list[Row]:
        # who could not be run for its memory is not run for its time either, for the same reason
        rows, runnable = [], []
        for one in timed:
            memory = session.results.rows[self._key(one, "memory")]
            if memory.status == "measured":
                runnable.append(one)
            else:
                rows.append(Row(self._key(one, measure), memory.status, memory.note))
        if runnable:
            outcome = session.call(
                f"{self.growth.module}:measure_times",
                plain=measure != "time",
                contenders=runnable,
                shape=self.shape,
                device=session.options.device,
                budget=self.growth.budgets * session.options.budget,
            )
            for one in runnable:
                value = outcome.value[one] if outcome.status == "measured" else None
                rows.append(session.row(self._key(one, measure), outcome._replace(value=value)))
        return rows

    def _key(self, contender: str, measure: str) -> RowId:
        return self.growth.key(self.sweep, contender, measure, self.shape)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
