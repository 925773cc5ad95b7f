"""Fresh processes for measurements: a worker that forks for every job, and the parent's end of it.

A worker imports torch once and runs nothing itself. Every job gets a fork of it: no tensor, no cache and no heap
is left from the job before, and no second is spent on importing. What malloc does is read from the environment at
the start of a process, so there is a worker for every setting of it. A fork must not use the threads that torch may
have started before: where more than one is timed, the job is a program of its own, as a host is.
"""

import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any, NamedTuple

from benchmarks.environment import ROOT

# what jobs import, for most of a second each in every fork, and what compiled contenders do, for seconds
PRELOADED = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "benchmarks.suites.add_ons",
    "benchmarks.suites.gate",
    "benchmarks.suites.kernels",
    "benchmarks.suites.linear_vs_quadratic",
    "benchmarks.suites.training_step",
)
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc")


class Outcome(NamedTuple):
    """How a job ended: a value where it was "measured", and else a note."""

    status: str
    note: str
    value: Any


class Worker:
    """The parent's end of a worker process.

    Args:
        environment: what its environment holds beside the parent's own.
        device: ``"cpu"`` or ``"cuda"``.
        threads: of torch, in every job.
        memory_cap: bytes that a job on a CPU may have more than it starts with.
        prepared: whether to import what jobs may need, once for all.
    """

    def __init__(
        self, environment: Mapping[str, str], *, device: str, threads: int, memory_cap: int, prepared: bool = True
    ) -> None:
        self._environment = dict(environment)
        # a process that has asked for a GPU cannot fork any more: there, jobs import for themselves
        self._arguments = ["prepared"] if prepared and device == "cpu" else []
        self._limits = {"device": device, "threads": threads, "memory_cap": memory_cap}
        self._process: subprocess.Popen[str] | None = None

    def call(self, function: str, *, threads: int | None = None, alone: bool = False, **arguments: Any) -> Outcome:
        """Run ``"module:function"`` of this package with arguments that JSON can hold, in a fresh process.

        That is a fork, or, ``alone``, a program of its own.
        """
        process = self._started()
        limits = self._limits | ({} if threads is None else {"threads": threads})
        job = {"function": function, "arguments": arguments, "limits": limits, "alone": alone}
        stdin, stdout = _pipes(process)
        stdin.write(json.dumps(job) + "\n")
        stdin.flush()
        answer = stdout.readline()
        if not answer:
            code = process.wait()
            self._process = None
            return Outcome("failed", f"the worker ended with code {code}", None)
        return Outcome(*json.loads(answer))

    def start(self) -> None:
        """Start the process without waiting for it; otherwise the first call does."""
        self._started()

    def close(self) -> None:
        """End the process and whatever it has started."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        for pipe in _pipes(self._process):
            pipe.close()
        self._process.wait()
        self._process = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            threads = str(self._limits["threads"])
            # kernels under an interpreter are there to be tested, not timed
            inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            environment = inherited | {
                "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), *filter(None, sys.path)]),
                "OMP_NUM_THREADS": threads,
                "MKL_NUM_THREADS": threads,
                # in the job itself rather than in processes beside it
                "TORCHINDUCTOR_COMPILE_THREADS": "1",
                # whether there is a GPU is asked without starting it
                "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
                # the profiler announces its starts and stops otherwise
                "KINETO_LOG_LEVEL": "99",
            }
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.child", *self._arguments],
                cwd=ROOT,
                env=environment | self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                # Ctrl-C is the parent's to deal with
                start_new_session=True,
            )
        return self._process


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("a worker has pipes")
    return process.stdin, process.stdout


def serve(*, prepared: bool) -> None:
    """Run jobs from standard input until it ends, an answer a line; whatever else is printed goes to the errors."""
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        if prepared:
            _prepare()
        for line in sys.stdin:
            job = json.loads(line)
            outcome = _in_a_program(job) if job["alone"] else _in_a_fork(job)
            channel.write(json.dumps(outcome, allow_nan=False) + "\n")
            channel.flush()


def _prepare() -> None:
    from benchmarks.memory import recorder

    for name in PRELOADED:
        importlib.import_module(name)
    # the first one takes a second to start
    with recorder():
        pass
    # a fork that collects its garbage would otherwise copy every page that an object lies on
    gc.collect()
    gc.freeze()


def _in_a_program(job: dict[str, Any]) -> Outcome:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.child", "once"],
        input=json.dumps({**job, "alone": False}),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.stdout:
        return Outcome(*json.loads(done.stdout))
    return _broken(done.returncode)


def run_once() -> None:
    """Run the job on standard input, here and now; whatever else is printed goes to the errors."""
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)
        channel.write(json.dumps(run(json.load(sys.stdin)), allow_nan=False))


def _in_a_fork(job: dict[str, Any]) -> Outcome:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as answer:
            answer.write(json.dumps(run(job), allow_nan=False))
        # nothing of the worker's is to be flushed or torn down twice
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    if text:
        return Outcome(*json.loads(text))
    return _broken(os.waitstatus_to_exitcode(status))


def _broken(code: int) -> Outcome:
    if code == -signal.SIGKILL:
        return Outcome("memory", "killed by the system, as when memory runs out", None)
    return Outcome("failed", f"the process ended with code {code}", None)


def run(job: dict[str, Any]) -> Outcome:
    """Run a job here and now; say how it ended."""
    module, _, name = job["function"].partition(":")
    limits = job["limits"]
    try:
        import torch

        torch.set_num_threads(limits["threads"])
        if limits["device"] == "cpu":
            _limit_memory(limits["memory_cap"])
        return Outcome("measured", "", getattr(importlib.import_module(module), name)(**job["arguments"]))
    except MemoryError:
        return Outcome("memory", _cap_note(limits), None)
    except Exception as error:
        if any(sign in str(error) for sign in OUT_OF_MEMORY):
            return Outcome("memory", _cap_note(limits), None)
        traceback.print_exc()
        return Outcome("failed", f"{type(error).__name__}: {' '.join(str(error).split())}"[:500], None)


def _cap_note(limits: Mapping[str, Any]) -> str:
    return f"ran out of memory at the cap of {limits['memory_cap'] / 1e9:.1f} GB"


def _limit_memory(num_bytes: int) -> None:
    """Let an allocation fail in this process before the machine runs out."""
    with open("/proc/self/statm") as numbers:
        now = int(numbers.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (now + num_bytes, hard))


if __name__ == "__main__":
    if "once" in sys.argv[1:]:
        run_once()
    else:
        serve(prepared="prepared" in sys.argv[1:])
