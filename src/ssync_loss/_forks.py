"""Forked processes: the OpenMP library of torch would wait there forever for threads that only the parent has."""

import os
import re
import warnings
from pathlib import Path

import torch

from ssync_loss._compilers import constant

# the flag of a process that was forked and still runs the program of its parent, in /proc/self/stat
FORKED = 0x40
# in the command of a fork server
SERVER = b"multiprocessing.forkserver"
# in the path of a library with threads of OpenMP
THREADED = re.compile(rb"lib(torch|[gi]?omp)")


def is_forked() -> bool | None:
    """Tell whether this process was forked from one that may have used threads; None if that is unknown."""
    return _forked[0]


@constant
def take_one_thread_if_forked(device: str) -> None:
    """Limit torch to one thread in a forked process that computes on the CPU: for good, as a backward may follow."""
    if device == "cpu" and is_forked() and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        warnings.warn(
            "torch.set_num_threads(1) was called: this process was forked, and an operator of torch could wait there "
            "forever for the threads of its parent. Call it yourself after a fork. (Said once.)",
            stacklevel=2,
        )


def _read() -> bool | None:
    flags = _flags("self")
    return bool(flags & FORKED) and not _has_plain_parent() if flags else None


def _flags(process: str) -> int:
    """Return the flags of a process, or 0 if they are unknown; gVisor and WSL 1 have none."""
    try:
        # bytes, as the program's name may be truncated within a letter
        return int(Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[6])
    except (OSError, IndexError, ValueError):
        return 0


def _has_plain_parent() -> bool:
    """Tell whether the parent lives and has no threads of OpenMP."""
    process = str(os.getppid())
    parent = Path("/proc", process)
    try:
        command = (parent / "cmdline").read_bytes()
        # an orphan's next parent runs another command
        if command != Path("/proc/self/cmdline").read_bytes():
            return False
        # a child of a fork server has the server's command, and may have ended threads
        if SERVER in command and not _flags(process) & FORKED and len(os.listdir(parent / "task")) == 1:
            return True
        # of a parent that has ended this is empty
        loaded = (parent / "maps").read_bytes()
        return bool(loaded) and not THREADED.search(loaded)
    except OSError:
        return False


def _after_fork() -> None:
    _forked[0] = _forked[0] is not False or not _has_plain_parent()


# what is_forked() returns; a fork writes to it
_forked = [_read()]
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
