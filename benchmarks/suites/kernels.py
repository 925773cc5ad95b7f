"""Every operation by every backend: time, bytes against measured bandwidth, launches; the step in exponentials."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

from benchmarks.child import ROOT
from benchmarks.contenders import (
    AUTO,
    COMPILED,
    COPY,
    EXP,
    OPERATIONS,
    REPLAY,
    STEP,
    TORCH,
    TWO_THREADS,
    base_of,
    name_of,
)
from benchmarks.measure import counts, memory, times
from benchmarks.plan import Job, Options
from benchmarks.results import Key, Spread, Values

SUITE = "kernels"
FIRST_USE = "first use, compiler included"
# one clip of the published training, and its batch
MOVI_C = {"T": 4, "S": 11, "H": 24, "W": 24}
YTVIS = {"T": 4, "S": 7, "H": 37, "W": 37}
BATCH = 64
# batch, frames and dtype; on a GPU, the last two are maps of 256 MB and more, no longer in any cache
WORKLOADS = {
    "cpu": ((4, MOVI_C, "float32"), (BATCH, MOVI_C, "float32"), (BATCH, YTVIS, "float32")),
    "cuda": (
        (BATCH, MOVI_C, "float16"),
        (BATCH, MOVI_C, "float32"),
        (BATCH, YTVIS, "float16"),
        (5296, MOVI_C, "float16"),
        (2648, MOVI_C, "float32"),
    ),
}


def plan(options: Options) -> list[Job]:
    """Plan memory, counts and times of every workload on one thread, and the first use."""
    jobs = []
    for batch, frames, dtype in WORKLOADS[options.device][: 2 if options.quick else None]:
        shape = {"B": batch, **frames}
        keys = [Key(SUITE, case, name, tuple(shape.items()), dtype) for case, name in names(shape, options)]
        yardsticks = [keys[0]._replace(case=case, contender=TORCH) for case in (COPY, EXP)]
        plain = [key for key in keys if base_of(key.contender) == key.contender]
        # a compiled step has no operators to count on a CPU
        countable = [key for key in plain if not (options.device == "cpu" and key.contender.endswith(COMPILED))]
        jobs += [Job(memory, [key], "allocated", threads=1) for key in plain if key.case == STEP]
        jobs += [Job(counts, countable, "launches", threads=1), Job(times, [*yardsticks, *keys], "step", 1, alone=True)]
    if options.backends[0] == AUTO["cpu"]:
        shape = {"B": 4, **MOVI_C}
        jobs.append(Job(first_use, [Key(SUITE, FIRST_USE, name_of(AUTO["cpu"]), tuple(shape.items()))], "step", 1))
    return jobs


def names(shape: dict[str, int], options: Options) -> Iterator[tuple[str, str]]:
    """Name the operations of a workload, and by whom: where maps are large or it is compiled, steps alone."""
    for backend in options.backends:
        for case in OPERATIONS:
            is_step = case.startswith("step")
            if is_step or shape["B"] <= BATCH:
                yield case, name_of(backend)
            if is_step and options.device == "cuda":
                yield case, name_of(backend) + REPLAY
            elif is_step and backend == AUTO["cpu"]:
                yield case, name_of(backend) + TWO_THREADS
    # every shape is a compilation, one of them says enough; in a rehearsal the first backend
    if shape == {"B": BATCH, **MOVI_C}:
        for name in map(name_of, options.backends[: 1 if options.quick else None]):
            yield STEP, name + COMPILED
            if options.device == "cuda":
                yield STEP, name + COMPILED + REPLAY


def first_use(keys: Sequence[Key], options: Options) -> list[Values]:
    """Time the first step of new processes that find no library of the engine."""
    seconds = []
    for _ in range(1 if options.quick else 5):
        with tempfile.TemporaryDirectory() as empty:
            command = [sys.executable, "-m", "benchmarks.first_use"]
            environment = os.environ | {"SSYNC_LOSS_CACHE": empty}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
        seconds.append(float(done.stdout))
    return [{"step": Spread.of(seconds)} for _ in keys]
