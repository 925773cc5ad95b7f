"""Engines: what computes SSync. One contract (:mod:`.contract`), and one place where an engine is chosen: here.

``"torch"`` is the method as it reads, ``"cpu"`` a C library compiled at first use, ``"triton"`` CUDA kernels,
``"reference"`` loops.
"""

import warnings
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ssync_loss._checks import check_choice
from ssync_loss._compilers import constant
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
# what is faster than torch, by the type of a device
FAST = {"cpu": "cpu", "cuda": "triton"}


def check_backend(backend: object) -> None:
    """Require a known name, and what can be asked of the machine before there are maps.

    Raises: ValueError if the name is unknown, or the engine cannot be had here.
    """
    check_choice("backend", backend, BACKENDS)
    if backend != "auto":
        _require(str(backend))


def resolve(backend: Backend, *maps: Tensor) -> Engine:
    """Return what computes for these maps.

    ``"auto"`` takes a fast engine where it can take the maps and has agreed with torch on a small case, once a process
    and device; torch everywhere else. What is asked for by name is not second-guessed.

    Raises: ValueError if the name is unknown, or the engine cannot take the maps.

    >>> type(resolve("auto", torch.zeros(1, 1, 2, 1, 1, device="meta"))).__name__
    'TorchEngine'
    """
    check_choice("backend", backend, BACKENDS)
    if backend != "auto":
        _require(backend, *maps)
        return _ready(backend)
    device = maps[0].device
    fast = FAST.get(device.type)
    if fast is not None and ENGINES[fast].missing(*maps) is None and is_trusted(fast, str(device)):
        return _ready(fast)
    return _ready("torch")


def _ready(name: str) -> Engine:
    if name == "torch":
        take_one_thread_if_forked()
    return ENGINES[name]


@constant
def is_trusted(name: str, device: str) -> bool:
    """Tell whether an engine agrees with torch on a device: values, labels and gradients of a small case.

    Asked once a process and device; a compiler asks while it traces, and takes the answer as a constant. While a CUDA
    graph is captured nothing is run: an answer from before holds, and without one it is no.
    """
    if (name, device) not in _answers:
        if device.startswith("cuda") and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False
        complaint = complaint_about(ENGINES[name], ENGINES["torch"], device)
        _answers[name, device] = complaint is None
        if complaint is not None:
            warnings.warn(
                f"Engine {name!r} does not agree with plain torch on {device}, so backend='auto' takes torch there. "
                f"Please report this with the output of `python -m ssync_loss.env`: {complaint} (Said once.)",
                stacklevel=2,
            )
    return _answers[name, device]


_answers: dict[tuple[str, str], bool] = {}


def _require(name: str, *maps: Tensor) -> None:
    missing = ENGINES[name].missing(*maps)
    if missing is not None:
        raise ValueError(f"`backend`={name!r} needs {missing}.")
