"""Fresh processes for measurements: a fork of one that has imported what it needs and run nothing, or a new program.

A fork must not use the threads that torch may have started before: where more than one thread is timed, the work is
done in a program of its own, as a host is.
"""

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[1]
# glibc hands large blocks back to the system and takes fresh pages at the next step: each costs a fault, from a
# size on, which bends the slope of time. Raised, memory stays with the process. By their numbers in malloc.h.
RAISED = {"M_MMAP_MAX": 0, "M_TRIM_THRESHOLD": -1, "M_TOP_PAD": 64 << 20}
NUMBERS = {"M_MMAP_MAX": -4, "M_TRIM_THRESHOLD": -1, "M_TOP_PAD": -2}
# each takes a fork most of a second to import
PRELOADED = ["torch._dynamo", "benchmarks.gate", "benchmarks.suites.training_step"]
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc")


class Limits(NamedTuple):
    """What a process may take, and how it starts."""

    threads: int = 1
    # bytes more than it starts with; None on a GPU, whose memory is not of the process
    memory: int | None = None
    # whether malloc keeps what it has
    raised: bool = False
    # whether it is a program of its own rather than a fork
    alone: bool = False


class Outcome(NamedTuple):
    """How a call ended: a value where it was "measured", and else a note."""

    status: str
    note: str = ""
    value: Any = None


def call(function: Callable[..., Any], *arguments: Any, limits: Limits) -> Outcome:
    """Call a function of a module in a fresh process."""
    context: Any = multiprocessing.get_context("spawn" if limits.alone else "forkserver")
    if not limits.alone:
        context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments, limits), daemon=True)
    # what a process reads as it starts
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), *filter(None, sys.path)]),
        "OMP_NUM_THREADS": str(limits.threads),
        "MKL_NUM_THREADS": str(limits.threads),
        # in the process itself rather than in others beside it
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        # the profiler announces its starts and stops otherwise
        "KINETO_LOG_LEVEL": "99",
    }
    with patch.dict(os.environ, environment):
        # kernels under an interpreter are there to be tested, not timed
        os.environ.pop("TRITON_INTERPRET", None)
        process.start()
    theirs.close()
    with suppress(EOFError):
        outcome: Outcome = ours.recv()
        process.join()
        return outcome
    process.join()
    if process.exitcode == -signal.SIGKILL:
        return Outcome("memory", "killed by the system, as when memory runs out")
    return Outcome("failed", f"the process ended with code {process.exitcode}")


def _answer(channel: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], limits: Limits) -> None:
    # Ctrl-C is the parent's to deal with
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    try:
        _limit(limits)
        outcome = Outcome("measured", value=function(*arguments))
    except AssertionError as error:
        outcome = Outcome("wrong", " ".join(str(error).split())[:500] or "disagrees with the reference")
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        outcome = Outcome("failed", said[:500])
        if isinstance(error, MemoryError) or any(sign in said for sign in OUT_OF_MEMORY):
            outcome = Outcome("memory", f"ran out of memory at the cap of {(limits.memory or 0) / 1e9:.1f} GB")
        else:
            traceback.print_exc()
    channel.send(outcome)


def _limit(limits: Limits) -> None:
    torch.set_num_threads(limits.threads)
    if limits.memory is not None:
        # an allocation is to fail in this process before the machine runs out
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (now + limits.memory, hard))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    for name, value in RAISED.items() if limits.raised else ():
        if mallopt(NUMBERS[name], value) != 1:
            raise RuntimeError(f"this malloc has no {name}")
