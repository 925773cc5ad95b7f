"""Helpers of all launches. The helpers and the operators read no data and wait for no device.

Only a launch imports the kernels' modules, so that the operators can be defined without triton.
"""

from math import e, log2
from typing import Any

import torch
from torch import Tensor

from ssync_loss.ssync.engines.triton._tiling import Tiling

# registers of a thread: without this limit the assembler spills registers so that one more program fits
MAX_REGISTERS = 168
# at most MAX_SHARES programs share the loss of a map; one program then adds up SHARES_AT_ONCE shares at a time
MAX_SHARES = 8192
SHARES_AT_ONCE = 1024


def launch(kernel: Any, num_programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel with all programs on the first axis: the other axes hold at most 65,535."""
    kernel[(num_programs,)](*arguments, maxnreg=MAX_REGISTERS, **constants)


def criterion_of(name: str, label_smoothing: float, temperature: float) -> tuple[float | None, ...]:
    """Return the arguments ``criterion`` of the kernels; the compiler removes code for None.

    >>> criterion_of("cross_entropy", 0.1, 2.0)[1:], criterion_of("mse", 0.0, 2.0)[1:]
    ((0.5, 1, 0.1), (0.5, None, None))
    """
    return log2(e) / temperature, 1 / temperature, 1 if name == "cross_entropy" else None, label_smoothing or None


def shares(maps: Tensor, num_maps: int, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """Allocate the errors and counts of the programs that share a loss."""
    num_programs = min(tiling.num_tiles, MAX_SHARES)
    errors = maps.new_empty((num_maps, num_programs), dtype=torch.float32)
    return errors, maps.new_empty((num_maps, 3, num_programs), dtype=torch.int32)
