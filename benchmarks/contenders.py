"""SSync by each of its backends, and how rows are named that measure the same in another way."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssync_loss import SSyncLoss

# everything that could be measured, the fastest first; "reference" is what the gate compares with
BACKENDS = ("cpu", "triton", "torch")
# what backend="auto" takes on a device where it can
AUTO = {"cpu": "cpu", "cuda": "triton"}
MERGE_THRESHOLD = 0.7
COMPILED = " compiled"
# behind the name of a contender
TWO_THREADS, REPLAY, USUAL_MALLOC = ", 2 threads", ", graph replay", ", malloc as it comes"


def name_of(backend: str) -> str:
    """Name SSync by one of its backends."""
    return f"SSync {backend}"


def base_of(contender: str) -> str:
    """Name who is measured, without how."""
    for how in (TWO_THREADS, REPLAY, USUAL_MALLOC):
        contender = contender.removesuffix(how)
    return contender


def backend_of(contender: str) -> Any:
    """Return the backend of SSync by its name."""
    return base_of(contender).removesuffix(COMPILED).removeprefix("SSync ")


def ssync_criterion(contender: str, **settings: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Build the loss of a contender; compiled, it is compiled once for every shape.

    Dynamic shapes would also make the settings symbols, and compile to slower code.
    """
    criterion = SSyncLoss(**{"merge_threshold": MERGE_THRESHOLD, "backend": backend_of(contender), **settings})
    if base_of(contender).endswith(COMPILED):
        compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(criterion, fullgraph=True, dynamic=False)
        return compiled
    return criterion
