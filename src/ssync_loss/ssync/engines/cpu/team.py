"""Finds the threads that torch's operators run on, so that the engine's C code can run on them, too."""

from ctypes import CDLL, c_void_p, cast

from ssync_loss._forks import is_forked


def address_of_team() -> int | None:
    """Return the address of ``GOMP_parallel`` in torch's OpenMP library, or None where the process may be forked."""
    return _address if is_forked() is False else None


def _find() -> int | None:
    try:
        # torch loads its library for everybody to see
        return cast(CDLL(None).GOMP_parallel, c_void_p).value
    except (OSError, AttributeError, TypeError):
        return None


_address = _find()
