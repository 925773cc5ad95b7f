"""SSync against dense alignment as a clip, or a batch, grows: time, memory, and where each has to stop."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.child import Outcome
from benchmarks.contenders import (
    CONTENDERS,
    DENSE,
    DENSE_CHUNKED,
    DENSE_WINDOWS,
    PARTS,
    Contender,
    loss_and_leaves,
    run_once,
    ssync_contender,
    step_of,
)
from benchmarks.gate import COMPILED_SHAPE
from benchmarks.memory import peak_memory
from benchmarks.results import Results, Row, RowId, values_to_json
from benchmarks.session import Options, Session, Task
from benchmarks.slopes import predict
from benchmarks.timing import clock_of, interleave

SUITE = "linear_vs_quadratic"
MODULE = "benchmarks.suites.linear_vs_quadratic"
NUM_SLOTS = 11
DTYPE = "float32"
# between losses over millions of patches in different orders; a wrong label or patch moves more
LOSS_RTOL = 1e-4


class Sweep(NamedTuple):
    """One axis that grows.

    Attributes:
        name: of the axis.
        shapes: from small to large.
    """

    name: str
    shapes: list[dict[str, int]]


def sweeps(options: Options) -> list[Sweep]:
    """Return the three sweeps: frames of 16 to 65,536 patches, clips of 4 frames and more, 1 clip and more.

    A GPU takes larger clips, as it takes them to keep it busy.
    """
    spatial = [_shape(1, 16, *_grid(size // 16)) for size in _ladder(options, 256, 2)]
    temporal = [_shape(1, size // 256, 16, 16) for size in _ladder(options, 1024, 4)]
    clips = [_shape(size // 1024, 4, 16, 16) for size in _ladder(options, 1024, 4)]
    return [Sweep("H*W", spatial), Sweep("T", temporal), Sweep("B", clips)]


def _ladder(options: Options, first: int, quick_step: int) -> list[int]:
    """Return powers of two of patches: few for a rehearsal, and every second on a GPU where no fit needs the others."""
    powers = range(first.bit_length() - 1, 25 if options.device == "cuda" else 21)
    if options.quick:
        return [1 << k for k in powers[::quick_step]]
    if options.device == "cuda":
        return [1 << k for k in powers if k % 2 == 0 or 12 <= k <= 16 or k >= 20]
    return [1 << k for k in powers]


def contenders(options: Options, sweep: str, shape: dict[str, int]) -> list[Contender]:
    """Return who takes part at a size; the first is what the others are compared with.

    Compiled, every shape is a compilation, so that only one sweep has it, at every second size. Windows are
    linear in time, dense alignment in clips: there, larger sizes than these say nothing new.
    """
    chosen = [ssync_contender(backend) for backend in options.backends]
    if sweep == "H*W" and num_patches(shape) in compiled_sizes(options):
        chosen += [ssync_contender(backend, compiled=True) for backend in options.backends]
    if sweep != "B" or shape["B"] <= 64:
        chosen += [DENSE, DENSE_CHUNKED]
    if sweep == "H*W" or (sweep == "T" and shape["T"] <= 512):
        chosen += DENSE_WINDOWS
    return chosen


def compiled_sizes(options: Options) -> list[int]:
    """Return the sizes, in patches, at which compiled contenders take part."""
    if options.quick:
        # the gate's own shape, so that there is one compilation
        return [num_patches(COMPILED_SHAPE)]
    first = 65_536 if options.device == "cuda" else 4096
    return [first << k for k in range(0, 9, 2)]


def num_patches(shape: dict[str, int]) -> int:
    """Count the patches of a batch."""
    return shape["B"] * shape["T"] * shape["H"] * shape["W"]


def plan(options: Options) -> list[Task]:
    """Plan a task for every size of every sweep."""
    tasks = []
    for sweep in sweeps(options):
        for shape in sweep.shapes:
            chosen = contenders(options, sweep.name, shape)
            rows = [_key(sweep.name, one, measure, shape) for measure in ("memory", "time") for one in chosen]
            # a rehearsal asks for it in one sweep only
            if options.device == "cpu" and (sweep.name == "H*W" or not options.quick):
                rows.append(_key(sweep.name, chosen[0], "time, default allocator", shape))
            tasks.append(Task(rows, _Size(sweep.name, shape, chosen, rows).run))
    return tasks


def contenders_of(options: Options) -> list[Contender]:
    """Return everyone who takes part somewhere, in order."""
    everyone = {
        one.name: one
        for sweep in sweeps(options)
        for shape in sweep.shapes
        for one in contenders(options, sweep.name, shape)
    }
    return [one for name, one in CONTENDERS.items() if name in everyone]


class _Size(NamedTuple):
    """One size of a sweep: memory first, a process each, then all in turn against the clock."""

    sweep: str
    shape: dict[str, int]
    contenders: list[Contender]
    rows: list[RowId]

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
        usual = self._key(self.contenders[0], "time, default allocator")
        if usual in missing:
            session.add(*self._times(session, self.contenders[:1], "time, default allocator"))

    def _memory(self, session: Session, contender: Contender) -> Outcome:
        stopped = session.stopped_at_gate(contender) or self._too_much(session, contender)
        if stopped is not None:
            return stopped
        # the usual malloc: what it keeps to itself is no memory that the loss needs
        outcome = session.call(
            f"{MODULE}:measure_memory",
            plain=True,
            contender=contender.name,
            shape=self.shape,
            device=session.options.device,
        )
        return self._compared(session, contender, outcome)

    def _compared(self, session: Session, contender: Contender, outcome: Outcome) -> Outcome:
        """Compare the loss with that of the first who computes the same: the gate is small, sizes are not."""
        twins = [one for one in self.contenders if _computes_the_same(one, contender)]
        first = session.results.rows.get(self._key(twins[0], "memory"))
        if outcome.status != "measured" or first is None or first.status != "measured":
            return outcome
        own, expected = outcome.value["loss"], first.number("loss")
        if abs(own - expected) <= LOSS_RTOL * abs(expected):
            return outcome
        return Outcome("wrong", f"the loss is {own:.8g}, and {expected:.8g} by {twins[0].name}", None)

    def _too_much(self, session: Session, contender: Contender) -> Outcome | None:
        """Say what a step should take that may not be taken, going by smaller sizes."""
        size, options = num_patches(self.shape), session.options
        seconds = history(session.results, self.sweep, contender, "time", "step")
        wanted = predict(seconds, size)
        if wanted is not None and wanted > options.time_cap:
            known, cost = _largest(seconds, size)
            note = f"a step should take {_number(wanted)} s after {_number(cost)} s at {known:,} patches"
            return Outcome("time", f"{note}; the cap is {options.time_cap:g} s", None)
        numbers = history(session.results, self.sweep, contender, "memory", "allocated")
        wanted = predict(numbers, size)
        if wanted is not None and wanted > options.memory_cap:
            known, cost = _largest(numbers, size)
            note = f"a step should take {_number(wanted / 1e9)} GB after {_number(cost / 1e9)} GB at {known:,} patches"
            return Outcome("memory", f"{note}; the cap is {options.memory_cap / 1e9:g} GB", None)
        return self._stopped_before(session, contender)

    def _stopped_before(self, session: Session, contender: Contender) -> Outcome | None:
        """Say why a smaller size has no number: then nothing tells what this one would take."""
        rows = session.results.select(suite=SUITE, case=self.sweep, contender=contender.name, measure="memory")
        for row in rows:
            size = num_patches(row.id.sizes)
            if row.status != "measured" and size < num_patches(self.shape):
                note = row.note if row.note.startswith("as at ") else f"as at {size:,} patches: {row.note}"
                return Outcome(row.status, note, None)
        return None

    def _times(self, session: Session, timed: Sequence[Contender], measure: str) -> list[Row]:
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
                f"{MODULE}:measure_times",
                plain=measure != "time",
                contenders=[one.name for one in runnable],
                shape=self.shape,
                device=session.options.device,
                budget=session.options.budget,
            )
            for one in runnable:
                value = outcome.value[one.name] if outcome.status == "measured" else None
                rows.append(session.row(self._key(one, measure), outcome._replace(value=value)))
        return rows

    def _key(self, contender: Contender, measure: str) -> RowId:
        return _key(self.sweep, contender, measure, self.shape)


def history(results: Results, sweep: str, contender: Contender, measure: str, value: str) -> list[tuple[int, float]]:
    """Return what was measured of a contender in a sweep: (patches, value), from small to large."""
    rows = results.select(suite=SUITE, case=sweep, contender=contender.name, measure=measure)
    return sorted((num_patches(row.id.sizes), row.number(value)) for row in rows if row.status == "measured")


def _computes_the_same(one: Contender, other: Contender) -> bool:
    return (one.backend is None, one.group_frames) == (other.backend is None, other.group_frames)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _largest(points: Sequence[tuple[int, float]], size: int) -> tuple[int, float]:
    return max(point for point in points if point[0] < size)


def _key(sweep: str, contender: Contender, measure: str, shape: dict[str, int]) -> RowId:
    return RowId.of(SUITE, sweep, contender.name, measure, shape, DTYPE)


def _shape(clips: int, frames: int, height: int, width: int) -> dict[str, int]:
    return {"B": clips, "T": frames, "S": NUM_SLOTS, "H": height, "W": width}


def _grid(patches: int) -> tuple[int, int]:
    """Return the most square grid of a power of two of patches."""
    height = 1 << (patches.bit_length() - 1) // 2
    return height, patches // height


def measure_memory(contender: str, shape: dict[str, int], device: str) -> dict[str, Any]:
    """Measure the peak of one step, in this process; what is compiled is compiled before."""
    chosen = CONTENDERS[contender]
    forward, leaves = loss_and_leaves(chosen, shape, dtype=getattr(torch, DTYPE), device=device)
    if chosen.compiled:
        run_once(forward, leaves)
    losses: list[Tensor] = []

    def step() -> object:
        loss, *grads = run_once(forward, leaves)
        losses.append(loss)
        return grads

    values = peak_memory(step, device) | {"loss": losses[0].item()}
    if chosen.compiled:
        # the compiler was here before
        values.pop("resident", None)
    return values_to_json(values)


def measure_times(contenders: list[str], shape: dict[str, int], device: str, budget: float) -> dict[str, Any]:
    """Time forward and backward of all in turn; the first is what ratios are taken to."""
    works = {}
    for name in contenders:
        forward, leaves = loss_and_leaves(CONTENDERS[name], shape, dtype=getattr(torch, DTYPE), device=device)
        if CONTENDERS[name].compiled:
            # which is no warming up
            run_once(forward, leaves)
        works[name] = step_of(forward, leaves)
    samples = interleave(works, clock_of(device), budget=budget)
    base = samples[contenders[0]]
    return {name: values_to_json({**one.values(PARTS), "ratio": one.over(base)}) for name, one in samples.items()}
