"""Every operation by every backend: time, bytes against measured bandwidth, launches; the step in exponentials."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.child import ROOT
from benchmarks.contenders import AUTO, COMPILED, COPY, EXP, REPLAY, TORCH, TWO_THREADS, backend_of, base_of, name_of
from benchmarks.measure import counts, memory, times
from benchmarks.plan import Job, Options
from benchmarks.results import Key, Spread, Values

SUITE = "kernels"
STEP = "step, mse"
FIRST_USE = "first use, compiler included"
# one clip of the published training
FRAMES = {
    "MOVi-C": {"T": 4, "S": 11, "H": 24, "W": 24},
    "YouTube-VIS": {"T": 4, "S": 7, "H": 37, "W": 37},
}
BATCH = 64
# on a GPU, maps of 256 MB and more in float16 and in float32, no longer in any cache
LARGE_BATCHES = {"float16": 5296, "float32": 2648}
CRITERIA = ("mse", "cross_entropy")


def workloads(options: Options) -> list[tuple[dict[str, int], str]]:
    """Return shapes and dtypes: the published batch, a small one, and on a GPU maps that no cache holds."""
    movi_c, ytvis = FRAMES["MOVi-C"], FRAMES["YouTube-VIS"]
    if options.device == "cuda":
        published = [(movi_c, "float16"), (movi_c, "float32"), (ytvis, "float16")]
        large = [({"B": batch, **movi_c}, dtype) for dtype, batch in LARGE_BATCHES.items()]
        return [*(({"B": BATCH, **frames}, dtype) for frames, dtype in published), *large]
    found = [{"B": 4, **movi_c}, {"B": BATCH, **movi_c}, {"B": BATCH, **ytvis}]
    return [(shape, "float32") for shape in found[: 2 if options.quick else None]]


def plan(options: Options) -> list[Job]:
    """Plan memory, counts and times of every workload on one thread, and the first use."""
    jobs = []
    for shape, dtype in workloads(options):
        keys = [Key(SUITE, case, name, tuple(shape.items()), dtype) for case, name in names(shape, options)]
        yardsticks = [keys[0]._replace(case=case, contender=TORCH) for case in (COPY, EXP)]
        plain = [key for key in keys if base_of(key.contender) == key.contender]
        # a compiled step has no operators to count on a CPU
        countable = [key for key in plain if not (options.device == "cpu" and key.contender.endswith(COMPILED))]
        jobs += [Job(memory, [key], "allocated", threads=1) for key in plain if key.case == STEP]
        jobs += [Job(counts, countable, "launches", threads=1), Job(times, [*yardsticks, *keys], "step", 1, alone=True)]
    if options.backends[0] == AUTO["cpu"]:
        shape = {"B": 4, **FRAMES["MOVi-C"]}
        jobs.append(Job(first_use, [Key(SUITE, FIRST_USE, name_of(AUTO["cpu"]), tuple(shape.items()))], "step", 1))
    return jobs


def names(shape: dict[str, int], options: Options) -> Iterator[tuple[str, str]]:
    """Name the operations of a workload, and by whom: where maps are large or it is compiled, steps alone."""
    for name in map(name_of, options.backends):
        if shape["B"] <= BATCH:
            yield from ((case, name) for case in ("labels", "pseudo-labels"))
            yield from ((f"distillation, {criterion}", name) for criterion in CRITERIA)
        for criterion in CRITERIA:
            yield f"step, {criterion}", name
            if options.device == "cuda":
                yield f"step, {criterion}", name + REPLAY
            elif backend_of(name) == AUTO["cpu"]:
                yield f"step, {criterion}", name + TWO_THREADS
    # every shape is a compilation, one of them says enough; in a rehearsal the first backend
    if shape == {"B": BATCH, **FRAMES["MOVi-C"]}:
        for name in map(name_of, options.backends[: 1 if options.quick else None]):
            yield STEP, name + COMPILED
            if options.device == "cuda":
                yield STEP, name + COMPILED + REPLAY


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
