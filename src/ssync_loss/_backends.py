"""Which implementation computes: chosen on facts that are known before any data is."""

from typing import Literal, TypeAlias

from torch import Tensor

from ssync_loss import kernels
from ssync_loss._checks import check_choice

Backend: TypeAlias = Literal["auto", "torch", "triton", "reference"]
BACKENDS = ("auto", "torch", "triton", "reference")


def check_backend(backend: object) -> None:
    """Require a known name, and what can be asked of the machine before there are maps.

    Raises:
        ValueError: if the name is unknown, or the kernels are asked for and Triton is not installed.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "triton":
        _require()


def resolve_backend(backend: Backend, *maps: Tensor) -> Literal["torch", "triton", "reference"]:
    """Return what computes for these maps; the value of a loss never depends on it.

    ``"auto"`` takes the kernels on a CUDA device where they can be had, and the torch path everywhere else.

    Raises:
        ValueError: if the name is unknown, or the kernels are asked for and cannot take the maps.

    >>> import torch
    >>> resolve_backend("auto", torch.zeros(1, 1, 2, 1, 1))
    'torch'
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "auto":
        return "triton" if maps[0].device.type == "cuda" and kernels.missing(*maps) is None else "torch"
    if backend == "triton":
        _require(*maps)
    return backend


def _require(*maps: Tensor) -> None:
    missing = kernels.missing(*maps)
    if missing is not None:
        raise ValueError(f"`backend`='triton' needs {missing}.")
