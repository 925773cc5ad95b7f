"""Every operation by every backend: time, bytes against measured bandwidth, launches; the step in exponentials."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.child import ROOT
from benchmarks.contenders import (
    AUTO,
    COMPILED,
    MERGE_THRESHOLD,
    REPLAY,
    TWO_THREADS,
    backend_of,
    base_of,
    name_of,
    ssync_criterion,
)
from benchmarks.counted import count, peak_memory
from benchmarks.inputs import Step, moving_blobs
from benchmarks.plan import Job, Options
from benchmarks.results import Key, Spread, Values
from benchmarks.timing import Work, clock_of, interleave
from ssync_loss import PseudoLabels
from ssync_loss.functional import pseudo_labels, selective_distillation_loss

SUITE = "kernels"
STEP = "step, mse"
FIRST_USE = "first use, compiler included"
COPY, EXP = "copy", "exp of both maps"
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

Workload = tuple[dict[str, int], str]


def workloads(options: Options) -> list[Workload]:
    """Return shapes and dtypes: the published batch, a small one, and on a GPU maps that no cache holds."""
    movi_c, ytvis = FRAMES["MOVi-C"], FRAMES["YouTube-VIS"]
    if options.device == "cpu":
        found = [({"B": 4, **movi_c}, "float32"), ({"B": 64, **movi_c}, "float32")]
        return found if options.quick else [*found, ({"B": 64, **ytvis}, "float32")]
    large = LARGE_MAP_BYTES // (movi_c["T"] * movi_c["S"] * movi_c["H"] * movi_c["W"])
    return [
        ({"B": 64, **movi_c}, "float16"),
        ({"B": 64, **movi_c}, "float32"),
        ({"B": 64, **ytvis}, "float16"),
        ({"B": large // 2 + 1, **movi_c}, "float16"),
        ({"B": large // 4 + 1, **movi_c}, "float32"),
    ]


def contenders(options: Options) -> list[tuple[str, str]]:
    """Return who takes part, in each dtype; of the compiled ones, for a rehearsal, the first."""
    eager = [name_of(one) for one in options.backends]
    compiled = [one + COMPILED for one in eager][: 1 if options.quick else None]
    return [
        (one, dtype) for dtype in dict.fromkeys(dtype for _, dtype in workloads(options)) for one in eager + compiled
    ]


def plan(options: Options) -> list[Job]:
    """Plan memory, counts and times of every workload on one thread, and the first use."""
    jobs = []
    for shape, dtype in workloads(options):
        keys = [
            Key(SUITE, case, name, tuple(shape.items()), dtype)
            for case, name in names(shape, [one for one, its in contenders(options) if its == dtype], options.device)
        ]
        yardsticks = [keys[0]._replace(case=case, contender="torch") for case in (COPY, EXP)]
        plain = [key for key in keys if base_of(key.contender) == key.contender]
        # a compiled step has no operators to count on a CPU
        countable = [key for key in plain if not (options.device == "cpu" and key.contender.endswith(COMPILED))]
        jobs += [Job(memory, [key], "allocated", threads=1) for key in plain if key.case == STEP]
        jobs += [Job(counts, countable, "launches", threads=1), Job(times, [*yardsticks, *keys], "step", 1, alone=True)]
    if options.backends[0] == AUTO["cpu"]:
        shape = {"B": 4, **FRAMES["MOVi-C"]}
        first = Key(SUITE, FIRST_USE, name_of(AUTO["cpu"]), tuple(shape.items()))
        jobs.append(Job(first_use, [first], "step", threads=1))
    return jobs


def names(shape: dict[str, int], chosen: Sequence[str], device: str) -> Iterator[tuple[str, str]]:
    """Name the operations of a workload, and by whom: steps alone where maps are large or it is compiled."""
    large = shape["B"] > COMPILED_SHAPE["B"]
    for name in chosen:
        compiled = name.endswith(COMPILED)
        if compiled and shape != COMPILED_SHAPE:
            continue
        if not compiled and not large:
            yield from ((case, name) for case in ("labels", "pseudo-labels"))
            yield from ((f"distillation, {criterion}", name) for criterion in CRITERIA)
        for criterion in CRITERIA[:1] if compiled else CRITERIA:
            yield f"step, {criterion}", name
            if device == "cuda":
                yield f"step, {criterion}", name + REPLAY
            elif backend_of(name) == AUTO["cpu"] and not compiled:
                yield f"step, {criterion}", name + TWO_THREADS


def operations(keys: Sequence[Key], options: Options) -> list[tuple[Step, int]]:
    """Make operations of a workload on common inputs, and say what bytes each has to move.

    These are inputs read and outputs written, once; of a whole step, see `STEP_PASSES`.
    """
    enc, dec = moving_blobs(keys[0].sizes, dtype=keys[0].dtype, device=options.device)
    labels = pseudo_labels(enc, dec, merge_threshold=MERGE_THRESHOLD)
    return [_operation(key, enc, dec, labels) for key in keys]


def _operation(key: Key, enc: Tensor, dec: Tensor, labels: PseudoLabels) -> tuple[Step, int]:
    kind, _, criterion = key.case.partition(", ")
    backend, chosen = backend_of(key.contender), cast("Any", criterion)
    map_bytes, patches = enc.numel() * enc.element_size(), labels.boundary.numel()
    if kind == "step":
        loss = ssync_criterion(key.contender, criterion=criterion)
        return _step(lambda: loss(enc, dec), enc, dec), STEP_PASSES * map_bytes
    if kind == "distillation":

        def distill() -> Tensor:
            return selective_distillation_loss(
                dec, labels.enc_labels, labels.boundary, criterion=chosen, backend=backend
            )

        return _step(distill, dec), 2 * map_bytes + 9 * patches
    # without merging, these are hard labels and regions alone
    threshold = None if kind == "labels" else MERGE_THRESHOLD

    def find() -> PseudoLabels:
        return pseudo_labels(enc, dec, merge_threshold=threshold, backend=backend)

    # two planes of labels in int64 and two regions in bytes
    return Step(find, lambda: enc), 2 * map_bytes + 2 * 8 * patches + 2 * patches


def _step(forward: Callable[[], Tensor], *leaves: Tensor) -> Step:
    """Make a step; what it should give is compared at the gate."""
    return Step(forward, forward, list(leaves))


def on_two_threads(work: Work) -> Work:
    """Let a work have two threads while it runs."""

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


def _replayed(step: Step) -> Work:
    """Capture a step as a CUDA graph; return its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step.once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # the gradients lie in the graph's own memory
        step.once()
    return _call(graph.replay)


def _yardsticks(key: Key, device: str) -> dict[str, Work]:
    """Return a copy that no cache helps, and the exponentials of both maps."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    maps = [one.detach() for one in moving_blobs(key.sizes, dtype=key.dtype, device=device)]
    space = torch.empty_like(maps[0])

    def exponentials() -> None:
        for one in maps:
            torch.exp(one, out=space)

    return {COPY: _call(lambda: target.copy_(source)), EXP: _call(exponentials)}


def times(keys: Sequence[Key], options: Options) -> list[Values]:
    """Time all operations of a workload in turn with a large copy and the exponentials of both maps."""
    chosen = [key for key in keys if key.contender != "torch"]
    made = dict(zip(chosen, operations(chosen, options), strict=True))
    works: dict[Any, Work] = {**_yardsticks(keys[0], options.device)}
    for key, (step, _) in made.items():
        works[key] = step.work
        if key.contender.endswith(COMPILED):
            step.once()
        elif key.contender.endswith(REPLAY):
            works[key] = _replayed(step)
        elif key.contender.endswith(TWO_THREADS):
            works[key] = on_two_threads(step.work)
    samples = interleave(works, clock_of(options.device), 4 * options.budget)
    copy, exp = samples[COPY], samples[EXP]
    values: dict[Key, dict[str, float | Spread]] = {}
    for key in keys:
        if key not in made:
            values[key] = samples[key.case].values()
            if key.case == COPY:
                seconds = Spread.of([sum(call) for calls in copy.rounds for call in calls]).median
                values[key] |= {"bytes": 2 * COPY_BYTES, "bandwidth": 2 * COPY_BYTES / seconds}
            continue
        step, num_bytes = made[key]
        values[key] = {
            **samples[key].values(*(() if key.contender.endswith(REPLAY) else step.parts)),
            "bytes": num_bytes,
            # moving the bytes at the speed of the copy is 1
            "over_floor": samples[key].over(copy, 2 * COPY_BYTES / num_bytes),
            "over_exp": samples[key].over(exp),
        }
        one_thread = samples.get(key._replace(contender=base_of(key.contender)))
        if key.contender.endswith(TWO_THREADS) and one_thread is not None:
            values[key]["speedup"] = one_thread.over(samples[key])
    return [values[key] for key in keys]


def counts(keys: Sequence[Key], options: Options) -> list[Values]:
    """Count the launches and host reads of operations."""
    return [count(step.once, options.device) for step, _ in operations(keys, options)]


def memory(keys: Sequence[Key], options: Options) -> list[Values]:
    """Measure the peak of one step, and what waits for its backward, in maps beyond both gradients."""
    ((step, _),) = operations(keys, options)
    # what the first step alone takes is no part of it
    step.once()
    peak = peak_memory(step.once, options.device)["allocated"]
    alive = peak_memory(step.forward, options.device)["kept"]
    one_map = step.leaves[0].numel() * step.leaves[0].element_size()
    beyond, waiting = (round(held / one_map - 2, 4) for held in (peak, alive))
    return [{"allocated": peak, "maps_beyond_gradients": beyond, "maps_waiting": waiting}]


def first_use(keys: Sequence[Key], options: Options) -> list[Values]:
    """Time the first step of new processes that find no library of the engine."""
    seconds = []
    for _ in range(1 if options.quick else 5):
        with tempfile.TemporaryDirectory() as empty:
            given: dict[str, Any] = {"cwd": ROOT, "env": os.environ | {"SSYNC_LOSS_CACHE": empty}}
            command = [sys.executable, "-m", "benchmarks.first_use"]
            done = subprocess.run(command, check=False, capture_output=True, text=True, **given)
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
        seconds.append(float(done.stdout))
    return [{"step": Spread.of(seconds)} for _ in keys]
