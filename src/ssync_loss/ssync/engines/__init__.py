"""The engines that compute SSync, and the choice of an engine. All engines follow one contract (:mod:`.contract`).

``"torch"`` is plain torch, ``"cpu"`` is a C library compiled at first use, ``"triton"`` is CUDA kernels,
``"reference"`` is loops.
"""

import warnings
from typing import Literal, TypeAlias

from torch import Tensor

from ssync_loss._checks import check_choice
from ssync_loss._compilers import constant, is_capturing
from ssync_loss._forks import take_one_thread_if_forked
from ssync_loss.ssync.engines.contract import Engine
from ssync_loss.ssync.engines.cpu import CpuEngine
from ssync_loss.ssync.engines.plain_torch import TorchEngine
from ssync_loss.ssync.engines.reference import ReferenceEngine
from ssync_loss.ssync.engines.self_check import complaint_about
from ssync_loss.ssync.engines.triton import TritonEngine

Backend: TypeAlias = Literal["auto", "torch", "cpu", "triton", "reference"]

ENGINES: dict[str, Engine] = {
    "torch": TorchEngine(),
    "cpu": CpuEngine(),
    "triton": TritonEngine(),
    "reference": ReferenceEngine(),
}
BACKENDS = ("auto", *ENGINES)
# the engine that is faster than torch, by type of device
FAST = {"cpu": "cpu", "cuda": "triton"}


def check_backend(backend: object) -> None:
    """Require a known name, and an engine that this machine has.

    Raises: ValueError if the name is unknown, or the engine is not available.
    """
    check_choice("backend", backend, BACKENDS)
    if backend != "auto":
        _require(str(backend))


def resolve(backend: Backend, *maps: Tensor) -> Engine:
    """Return the engine for these maps.

    ``"auto"`` is the fast engine if it can take the maps and :func:`is_trusted`, else torch. A named engine is not
    tested.

    Raises: ValueError if the name is unknown, or the engine cannot take the maps.

    >>> import torch
    >>> type(resolve("auto", torch.zeros(1, 1, 2, 1, 1, device="meta"))).__name__
    'TorchEngine'
    """
    check_choice("backend", backend, BACKENDS)
    if backend != "auto":
        _require(backend, *maps)
        return _ready(backend, maps[0].device.type)
    device = maps[0].device
    fast = FAST.get(device.type)
    if fast is not None and ENGINES[fast].missing(*maps) is None and is_trusted(fast, str(device)):
        return _ready(fast, device.type)
    return _ready("torch", device.type)


def _ready(name: str, device: str) -> Engine:
    if name == "torch":
        take_one_thread_if_forked(device)
    return ENGINES[name]


@constant
def is_trusted(name: str, device: str) -> bool:
    """Tell whether an engine agrees with torch on a device: values, labels and gradients of a small case.

    The test runs once per process and device. A compiler runs the test while it traces, and keeps the answer as a
    constant. The test cannot run while a CUDA graph is captured; an engine without an earlier answer is not trusted.
    """
    if (name, device) not in _answers:
        if device.startswith("cuda") and is_capturing():
            return False
        complaint = complaint_about(ENGINES[name], ENGINES["torch"], device)
        _answers[name, device] = complaint is None
        if complaint is not None:
            warnings.warn(
                f"Engine {name!r} does not agree with plain torch on {device}, so backend='auto' uses torch there. "
                f"Please report this with the output of `python -m ssync_loss.env`: {complaint} (Said once.)",
                stacklevel=2,
            )
    return _answers[name, device]


_answers: dict[tuple[str, str], bool] = {}


def _require(name: str, *maps: Tensor) -> None:
    missing = ENGINES[name].missing(*maps)
    if missing is not None:
        raise ValueError(f"`backend`={name!r} needs {missing}.")
