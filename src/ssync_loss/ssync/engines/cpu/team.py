"""The threads that torch's operators run on: the engine's C code may have them, too, where they are there."""

import os
from ctypes import CDLL, c_void_p, cast
from pathlib import Path

# in /proc/self/stat, among the flags of a process: it was forked, and runs the program of its parent
FORKED = 0x40


def address_of_team() -> int | None:
    """Return the address of ``GOMP_parallel`` in torch's OpenMP library, or None in a forked process.

    There the library waits for threads that were left behind with the parent.
    """
    return _addresses[0] if _addresses else None


def _find() -> list[int | None]:
    try:
        flags = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6])
        # torch loads its library for everybody to see
        return [] if flags & FORKED else [cast(CDLL(None).GOMP_parallel, c_void_p).value]
    except (OSError, AttributeError):
        return []


# none, or one
_addresses = _find()
if _addresses:
    os.register_at_fork(after_in_child=_addresses.clear)
