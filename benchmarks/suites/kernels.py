"""Every operation by every backend: time, bytes against measured bandwidth, launches; the step in exponentials."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.contenders import (
    AUTO,
    CONTENDERS,
    MERGE_THRESHOLD,
    PARTS,
    TWO_THREADS,
    Contender,
    run_once,
    ssync_contender,
    ssync_criterion,
    step_of,
)
from benchmarks.counting import count
from benchmarks.environment import ROOT
from benchmarks.inputs import moving_blobs
from benchmarks.memory import peak_memory
from benchmarks.results import RowId, Spread, values_to_json
from benchmarks.session import Options, Session, Task
from benchmarks.timing import Work, clock_of, interleave
from ssync_loss import PseudoLabels
from ssync_loss.functional import (
    pseudo_labels,
    selective_distillation_loss,
)

SUITE = "kernels"
MODULE = "benchmarks.suites.kernels"
STEP = "step, mse"
FIRST_USE = "first use, compiler included"
# one clip of the published training
FRAMES = {
    "MOVi-C": {"T": 4, "S": 11, "H": 24, "W": 24},
    "YouTube-VIS": {"T": 4, "S": 7, "H": 37, "W": 37},
}
# compiled, every shape is a compilation: one of them says enough
COMPILED_SHAPE = {"B": 64, **FRAMES["MOVi-C"]}
# the maps of a step, each read or written once, with separate passes for statistics, counts and targets
STEP_PASSES = 9
COPY_BYTES = 128 << 20
# maps no longer in any cache
LARGE_MAP_BYTES = 256 << 20
CRITERIA = ("mse", "cross_entropy")
COPY, EXP = "copy", "exp of both maps"
FORWARD = ("forward",)
REPLAY = ", graph replay"


class Operation(NamedTuple):
    """An operation of one contender.

    Attributes:
        case: what it does.
        contender: by whom.
        work: a call, with marks around its parts.
        parts: their names.
        num_bytes: what has to be moved: inputs read and outputs written, once. For a whole step see `STEP_PASSES`.
    """

    case: str
    contender: str
    work: Work
    parts: Sequence[str]
    num_bytes: int


class Workload(NamedTuple):
    """Where operations are measured.

    Attributes:
        shape: of the maps.
        dtype: of the maps.
        steps_only: whether single operations are left out.
    """

    shape: dict[str, int]
    dtype: str
    steps_only: bool


def workloads(options: Options) -> list[Workload]:
    """Return the published batch, a small one, and on a GPU maps that no cache holds."""
    movi_c = FRAMES["MOVi-C"]
    if options.device == "cpu":
        found = [Workload({"B": clips, **movi_c}, "float32", False) for clips in (4, 64)]
        if not options.quick:
            found.append(Workload({"B": 64, **FRAMES["YouTube-VIS"]}, "float32", False))
        return found
    clip = movi_c["T"] * movi_c["S"] * movi_c["H"] * movi_c["W"]
    return [
        Workload({"B": 64, **movi_c}, "float16", False),
        Workload({"B": 64, **movi_c}, "float32", False),
        Workload({"B": 64, **FRAMES["YouTube-VIS"]}, "float16", False),
        Workload({"B": -(-LARGE_MAP_BYTES // (2 * clip)), **movi_c}, "float16", True),
        Workload({"B": -(-LARGE_MAP_BYTES // (4 * clip)), **movi_c}, "float32", True),
    ]


def contenders_of(options: Options) -> list[tuple[Contender, str]]:
    """Return who takes part, in each dtype."""
    dtypes = dict.fromkeys(one.dtype for one in workloads(options))
    eager, compiled = ([ssync_contender(one, compiled=c) for one in options.backends] for c in (False, True))
    # for a rehearsal, the first
    return [(one, dtype) for dtype in dtypes for one in eager + compiled[: 1 if options.quick else None]]


def plan(options: Options) -> list[Task]:
    """Plan a task for every workload, and one for the first use."""
    chosen = [one.name for one in dict.fromkeys(one for one, _ in contenders_of(options))]
    tasks = [_task(workload, chosen, options) for workload in workloads(options)]
    return [*tasks, _first_use(options)] if options.backends[0] == AUTO["cpu"] else tasks


def _first_use(options: Options) -> Task:
    key = RowId.of(SUITE, FIRST_USE, ssync_contender(AUTO["cpu"]).name, "time", {"B": 4, **FRAMES["MOVi-C"]})

    def run(session: Session) -> None:
        outcome = session.stopped_at_gate(key.contender) or session.call(
            f"{MODULE}:time_first_use", plain=True, threads=1, times=1 if options.quick else 5
        )
        session.add(session.row(key, outcome))

    return Task([key], run)


def _task(workload: Workload, contenders: list[str], options: Options) -> Task:
    pairs = list(names(workload, contenders, options.device))
    timed = [_key(workload, case, contender, "time") for case, contender in pairs]
    timed += [_key(workload, case, "torch", "time") for case in (COPY, EXP)]
    # a compiled step has no operators to count on a CPU, and a replayed one no launches
    counted = [
        _key(workload, case, contender, "counts")
        for case, contender in pairs
        if contender in CONTENDERS and not (options.device == "cpu" and "compiled" in contender)
    ]
    held = [_key(workload, STEP, one, "memory") for case, one in pairs if case == STEP and one in CONTENDERS]

    def run(session: Session) -> None:
        stopped = {one: session.stopped_at_gate(one) for one in contenders}
        for key in session.missing([*timed, *counted, *held]):
            outcome = stopped.get(_base(key.contender))
            if outcome is not None:
                session.add(session.row(key, outcome))
        able = [one for one, outcome in stopped.items() if outcome is None]
        arguments: dict[str, Any] = {**workload._asdict(), "device": session.options.device}
        # one thread, whatever the others take, and malloc as it comes: what is said in exponentials is said of that
        for key in session.missing(held):
            outcome = session.call(
                f"{MODULE}:measure_memory", plain=True, threads=1, contender=key.contender, **arguments
            )
            session.add(session.row(key, outcome))
        countable = [one for one in able if any(key.contender == one for key in counted)]
        jobs: list[tuple[list[RowId], str, dict[str, Any]]] = [
            (counted, "count_all", {"contenders": countable}),
            (timed, "time_all", {"contenders": able, "budget": 4 * session.options.budget}),
        ]
        for keys, function, more in jobs:
            missing = session.missing(keys)
            if missing:
                outcome = session.call(f"{MODULE}:{function}", plain=True, threads=1, alone=True, **arguments, **more)
                for key in missing:
                    value = None
                    if outcome.status == "measured":
                        value = outcome.value[_label(key.case, key.contender)]
                    session.add(session.row(key, outcome._replace(value=value)))

    return Task([*held, *counted, *timed], run)


def _key(workload: Workload, case: str, contender: str, measure: str) -> RowId:
    return RowId.of(SUITE, case, contender, measure, workload.shape, workload.dtype)


def _label(case: str, contender: str) -> str:
    return f"{case} / {contender}"


def _base(name: str) -> str:
    return name.removesuffix(REPLAY).removesuffix(TWO_THREADS)


def names(workload: Workload, contenders: Iterable[str], device: str) -> Iterable[tuple[str, str]]:
    """Name the operations of a workload, in the order in which they are made."""
    for name in contenders:
        compiled, backend = CONTENDERS[name].compiled, CONTENDERS[name].backend
        if compiled and workload.shape != COMPILED_SHAPE:
            continue
        if not compiled and not workload.steps_only:
            yield from ((case, name) for case in ("labels", "pseudo-labels"))
            yield from ((f"distillation, {criterion}", name) for criterion in CRITERIA)
        for criterion in CRITERIA[:1] if compiled else CRITERIA:
            yield f"step, {criterion}", name
            if device == "cuda":
                yield f"step, {criterion}", name + REPLAY
            elif backend == AUTO["cpu"] and not compiled:
                yield f"step, {criterion}", name + TWO_THREADS


class Given(NamedTuple):
    """What all operations of a workload share: maps, and what one operation hands to the next."""

    enc: Tensor
    dec: Tensor
    labels: PseudoLabels

    @classmethod
    def of(cls, workload: Workload, device: str) -> "Given":
        """Make the maps of a workload, and the rest of them."""
        enc, dec = moving_blobs(workload.shape, dtype=getattr(torch, workload.dtype), device=device)
        labels = pseudo_labels(enc, dec, merge_threshold=MERGE_THRESHOLD)
        return cls(enc, dec, labels)


def operations(workload: Workload, contenders: list[str], device: str) -> list[Operation]:
    """Make the operations of a workload on common inputs."""
    given = Given.of(workload, device)
    return [
        _step(case, contender, given) if case.startswith("step") else _single(case, contender, given)
        for case, contender in names(workload, contenders, device)
    ]


def _single(case: str, contender: str, given: Given) -> Operation:
    enc, dec, labels = given
    backend: Any = CONTENDERS[contender].backend
    kind, _, criterion = case.partition(", ")
    map_bytes, patches = enc.numel() * enc.element_size(), labels.boundary.numel()
    # two planes of labels in int64 and two regions in bytes
    label_bytes = 2 * 8 * patches + 2 * patches
    if kind in ("labels", "pseudo-labels"):
        # without merging, these are hard labels and regions alone
        threshold = None if kind == "labels" else MERGE_THRESHOLD
        work = _call(lambda: pseudo_labels(enc, dec, merge_threshold=threshold, backend=backend))
        return Operation(case, contender, work, FORWARD, 2 * map_bytes + label_bytes)
    chosen: Any = criterion

    def distill() -> Tensor:
        return selective_distillation_loss(dec, labels.enc_labels, labels.boundary, criterion=chosen, backend=backend)

    return Operation(case, contender, step_of(distill, [dec]), PARTS, 2 * map_bytes + 9 * patches)


def _step(case: str, contender: str, given: Given) -> Operation:
    leaves = [given.enc, given.dec]
    chosen = CONTENDERS[_base(contender)]
    loss = ssync_criterion(chosen, criterion=case.removeprefix("step, "))

    def forward() -> Tensor:
        return loss(*leaves)

    if chosen.compiled:
        run_once(forward, leaves)
    num_bytes = STEP_PASSES * given.enc.numel() * given.enc.element_size()
    if contender.endswith(REPLAY):
        return Operation(case, contender, _replayed(forward, leaves), ("replay",), num_bytes)
    work = step_of(forward, leaves)
    if contender.endswith(TWO_THREADS):
        work = _on_two_threads(work)
    return Operation(case, contender, work, PARTS, num_bytes)


def _on_two_threads(work: Work) -> Work:
    def threaded(mark: Callable[[], Any]) -> Sequence[Any]:
        usual = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            return work(mark)
        finally:
            torch.set_num_threads(usual)

    return threaded


def _call(function: Callable[[], object]) -> Work:
    def work(mark: Callable[[], Any]) -> list[Any]:
        before = mark()
        function()
        return [before, mark()]

    return work


def _replayed(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Work:
    """Capture a step as a CUDA graph; return its replay."""
    one = torch.ones((), device=leaves[0].device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(forward(), leaves, grad_outputs=one)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # the gradients lie in the graph's own memory
        torch.autograd.grad(forward(), leaves, grad_outputs=one)

    def work(mark: Callable[[], Any]) -> list[Any]:
        before = mark()
        graph.replay()
        return [before, mark()]

    return work


def _yardsticks(workload: Workload, device: str) -> dict[str, Work]:
    """Return a copy that no cache helps, and the exponentials of both maps."""

    def copy() -> None:
        target.copy_(source)

    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    maps = [one.detach() for one in moving_blobs(workload.shape, dtype=getattr(torch, workload.dtype), device=device)]
    memory = torch.empty_like(maps[0])

    def exponentials() -> None:
        for one in maps:
            torch.exp(one, out=memory)

    return {COPY: _call(copy), EXP: _call(exponentials)}


def time_all(
    shape: dict[str, int], dtype: str, steps_only: bool, contenders: list[str], device: str, budget: float
) -> dict[str, Any]:
    """Time all operations of a workload in turn with a large copy and the exponentials of both maps."""
    workload = Workload(shape, dtype, steps_only)
    made = operations(workload, contenders, device)
    yardsticks = _yardsticks(workload, device)
    works = yardsticks | {_label(one.case, one.contender): one.work for one in made}
    samples = interleave(works, clock_of(device), budget=budget)
    copy, exp = samples[COPY], samples[EXP]
    values: dict[str, Any] = {
        _label(COPY, "torch"): {
            **copy.values(("step",)),
            "bytes": 2 * COPY_BYTES,
            "bandwidth": 2 * COPY_BYTES / copy.whole().median,
        },
        _label(EXP, "torch"): exp.values(("step",)),
    }
    for one in made:
        label = _label(one.case, one.contender)
        values[label] = {
            **samples[label].values(one.parts),
            "bytes": one.num_bytes,
            # moving the bytes at the speed of the copy is 1
            "over_floor": samples[label].over(copy).scaled(2 * COPY_BYTES / one.num_bytes),
            "over_exp": samples[label].over(exp),
        }
        if one.contender.endswith(TWO_THREADS):
            values[label]["speedup"] = samples[_label(one.case, _base(one.contender))].over(samples[label])
    return {label: values_to_json(one) for label, one in values.items()}


def count_all(
    shape: dict[str, int], dtype: str, steps_only: bool, contenders: list[str], device: str
) -> dict[str, Any]:
    """Count the launches and host reads of all operations of a workload."""
    made = operations(Workload(shape, dtype, steps_only), contenders, device)
    return {
        _label(one.case, one.contender): values_to_json(count(partial(one.work, _no_mark), device))
        for one in made
        if one.contender in CONTENDERS
    }


def _no_mark() -> None:
    """Stand in for a clock."""


def measure_memory(
    shape: dict[str, int],
    dtype: str,
    steps_only: bool,  # noqa: ARG001 (a workload is passed whole)
    contender: str,
    device: str,
) -> dict[str, Any]:
    """Measure the peak of one step, and what waits for its backward, in maps beyond both gradients."""
    enc, dec = moving_blobs(shape, dtype=getattr(torch, dtype), device=device)
    loss = ssync_criterion(CONTENDERS[contender])
    # what the first step alone takes is no part of it
    run_once(lambda: loss(enc, dec), [enc, dec])
    peak = peak_memory(lambda: run_once(lambda: loss(enc, dec), [enc, dec]), device)["allocated"]
    alive = peak_memory(lambda: loss(enc, dec), device)["kept"]
    one_map = enc.numel() * enc.element_size()
    beyond, waiting = (round(held / one_map - 2, 4) for held in (peak, alive))
    return values_to_json({"allocated": peak, "maps_beyond_gradients": beyond, "maps_waiting": waiting})


def time_first_use(times: int) -> dict[str, Any]:
    """Time the first step of a new process that finds no library of the engine."""
    seconds = []
    for _ in range(times):
        with tempfile.TemporaryDirectory() as empty:
            command, environment = [sys.executable, "-m", "benchmarks.first_use"], {"SSYNC_LOSS_CACHE": empty}
            given: dict[str, Any] = {"cwd": ROOT, "env": os.environ | environment, "capture_output": True, "text": True}
            done = subprocess.run(command, check=False, **given)
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
        seconds.append(float(done.stdout))
    return values_to_json({"step": Spread.of(seconds)})
