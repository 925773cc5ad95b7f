"""Find the threads of torch's operators, so that the C code can use them."""

from ctypes import CDLL, c_void_p, cast

from ssync_loss._forks import is_forked


def address_of_team() -> int | None:
    """Return the address of ``GOMP_parallel`` in torch's OpenMP library, or None if the process may be forked."""
    return _address if is_forked() is False else None


def _find() -> int | None:
    try:
        # torch loads its library with global symbols
        return cast(CDLL(None).GOMP_parallel, c_void_p).value
    except (OSError, AttributeError, TypeError):
        return None


_address = _find()
