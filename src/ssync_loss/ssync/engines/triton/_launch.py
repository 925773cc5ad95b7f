"""What all launches share; nothing here or in the operators looks at data or waits for a device.

The kernels' own modules are imported when one of them is launched first, so that the operators need no triton.
"""

from math import e, log2
from typing import Any

import torch
from torch import Tensor

from ssync_loss.ssync.engines.triton._tiling import Tiling

# registers of a thread: with no limit at all the assembler spills a few to fit one more program beside the others
MAX_REGISTERS = 168
# programs that share the loss of a map, at most: one program adds up what they found
MAX_SHARES = 8192
SHARES_AT_ONCE = 1024


def launch(kernel: Any, num_programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on one axis of programs; the second and third hold no more than 65,535."""
    kernel[(num_programs,)](*arguments, maxnreg=MAX_REGISTERS, **constants)


def criterion_of(name: str, label_smoothing: float, temperature: float) -> tuple[float | None, ...]:
    """Return what a patch pays, as the kernels take it; what is None they are not compiled for.

    >>> criterion_of("cross_entropy", 0.1, 2.0)[1:], criterion_of("mse", 0.0, 2.0)[1:]
    ((0.5, 1, 0.1), (0.5, None, None))
    """
    return log2(e) / temperature, 1 / temperature, 1 if name == "cross_entropy" else None, label_smoothing or None


def shares(maps: Tensor, num_maps: int, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """Return memory for the errors and counts of the programs that share a loss."""
    num_programs = min(tiling.num_tiles, MAX_SHARES)
    errors = maps.new_empty((num_maps, num_programs), dtype=torch.float32)
    return errors, maps.new_empty((num_maps, 3, num_programs), dtype=torch.int32)
