"""Which implementation computes: chosen on facts that are known before any data is."""

from typing import Literal, TypeAlias

from ssync_loss._checks import check_choice

Backend: TypeAlias = Literal["auto", "torch", "reference"]
BACKENDS = ("auto", "torch", "reference")


def resolve_backend(backend: Backend) -> Backend:
    """Return ``"torch"`` for ``"auto"``, a known name as it is; the value of a loss never depends on it.

    Raises:
        ValueError: if the name is unknown.
    """
    check_choice("backend", backend, BACKENDS)
    return "torch" if backend == "auto" else backend
