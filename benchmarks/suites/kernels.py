"""Each operation by each backend: time over a copy and over exponentials, launches and memory; and the first use."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

from benchmarks.contenders import AUTO, COMPILED, COPY, EXP, OPERATIONS, REPLAY, STEP, TORCH, TWO_THREADS, name_of
from benchmarks.measure import measure
from benchmarks.plan import Job, Options
from benchmarks.results import Key, Row, Spread

SUITE = "kernels"
FIRST_USE = "first use, compiler included"
# a clip of the published trainings, and their batch
MOVI_C = {"T": 4, "S": 11, "H": 24, "W": 24}
YTVIS = {"T": 4, "S": 7, "H": 37, "W": 37}
BATCH = 64
# clips, frames and dtype; the last two on a GPU have maps of 256 MB, which no cache holds
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
    """Plan a job for each workload, and one for the first use."""
    jobs = []
    for batch, frames, dtype in WORKLOADS[options.device][: 2 if options.quick else None]:
        shape = {"B": batch, **frames}
        named = [(COPY, TORCH), (EXP, TORCH), *names(shape, options)]
        keys = [Key(SUITE, case, name, tuple(shape.items()), dtype) for case, name in named]
        jobs.append(Job(keys, measure, threads=1))
    if options.backends[0] == AUTO["cpu"]:
        key = Key(SUITE, FIRST_USE, name_of(AUTO["cpu"]), tuple({"B": 4, **MOVI_C}.items()))
        jobs.append(Job([key], first_use, threads=1))
    return jobs


def names(shape: dict[str, int], options: Options) -> Iterator[tuple[str, str]]:
    """Name the operations of a workload and their contenders; large maps and compiled code have steps alone."""
    for backend in options.backends:
        for case in OPERATIONS:
            is_step = case.startswith("step")
            if is_step or shape["B"] <= BATCH:
                yield case, name_of(backend)
            if is_step and options.device == "cuda":
                yield case, name_of(backend) + REPLAY
            elif is_step and backend == AUTO["cpu"]:
                yield case, name_of(backend) + TWO_THREADS
    # one shape, as every shape is a compilation
    if shape == {"B": BATCH, **MOVI_C}:
        for name in map(name_of, options.backends[: 1 if options.quick else None]):
            yield STEP, name + COMPILED
            if options.device == "cuda":
                yield STEP, name + COMPILED + REPLAY


def first_use(keys: Sequence[Key], options: Options) -> list[Row]:
    """Time the first step of new processes, which have to compile the engine."""
    seconds = []
    for _ in range(1 if options.quick else 5):
        with tempfile.TemporaryDirectory() as empty:
            command = [sys.executable, "-m", "benchmarks.first_use"]
            environment = os.environ | {
                "SSYNC_LOSS_CACHE": empty,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(sys.path),
            }
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
        seconds.append(float(done.stdout))
    return [Row(key, values={"step": Spread.of(seconds)}) for key in keys]
