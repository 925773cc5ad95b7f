"""Forked processes: the OpenMP library of torch would wait there forever for threads that only the parent has."""

import os
import re
import warnings
from pathlib import Path

import torch

from ssync_loss._compilers import constant

# a flag of a process in /proc/self/stat: it was forked, and still runs the program of its parent
FORKED = 0x40
# in the path of a library with threads of OpenMP
THREADED = re.compile(rb"lib(torch|[gi]?omp)")


def is_forked() -> bool | None:
    """Tell whether this process was forked from one that may have used threads; None if that is unknown."""
    return _forked[0]


@constant
def take_one_thread_if_forked(device: str) -> None:
    """Limit torch to one thread on the CPU of a forked process, for good, as a backward comes later."""
    if device == "cpu" and is_forked() and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        warnings.warn(
            "torch.set_num_threads(1) was called: this process was forked, and an operator of torch could wait there "
            "forever for the threads of its parent. Call it yourself after a fork. (Said once.)",
            stacklevel=2,
        )


def _read() -> bool | None:
    try:
        # bytes, as the program's name may be truncated within a letter
        flags = int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[6])
    except (OSError, IndexError, ValueError):
        return None
    # gVisor and WSL 1 have no flags
    return bool(flags & FORKED) and not _has_plain_parent() if flags else None


def _has_plain_parent() -> bool:
    """Tell whether the parent lives and has never loaded torch, as a fork server: then it has no such threads."""
    parent = Path(f"/proc/{os.getppid()}")
    try:
        # of a parent that has ended this is empty; an orphan's next parent runs another command
        loaded, command = (parent / "maps").read_bytes(), (parent / "cmdline").read_bytes()
        return bool(loaded) and not THREADED.search(loaded) and command == Path("/proc/self/cmdline").read_bytes()
    except OSError:
        return False


def _after_fork() -> None:
    _forked[0] = True


# one value; a fork changes it
_forked = [_read()]
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
