"""Finds the threads that torch's operators run on, so that the engine's C code can run on them, too."""

import os
from ctypes import CDLL, c_void_p, cast
from pathlib import Path

# a flag of a process in /proc/self/stat: it was forked, and still runs the program of its parent
FORKED = 0x40


def address_of_team() -> int | None:
    """Return the address of ``GOMP_parallel`` in torch's OpenMP library, or None in a forked process.

    There the library would wait forever for threads that only the parent has.
    """
    return _addresses[0] if _addresses else None


def _find() -> list[int | None]:
    try:
        # bytes, as the name of the program stands there, and may be cut within a letter
        flags = int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[6])
        # gVisor and WSL 1 tell of no flags, and so of no fork
        may_be_forked = flags == 0 or flags & FORKED
        # torch loads its library for everybody to see
        return [] if may_be_forked else [cast(CDLL(None).GOMP_parallel, c_void_p).value]
    except (OSError, AttributeError, IndexError, ValueError):
        return []


# none, or one
_addresses = _find()
if _addresses:
    os.register_at_fork(after_in_child=_addresses.clear)
