"""The value of a loss without patches."""

from torch import Tensor

from ssync_loss._autocast import at_least_float32


def attached_zero(*maps: Tensor) -> Tensor:
    """Return exactly 0, attached to the graph of the maps; no cell is read.

    >>> import torch
    >>> attached_zero(torch.tensor([float("nan")], requires_grad=True)).item()
    0.0
    """
    total = at_least_float32(maps[0][:0]).sum()
    for one in maps[1:]:
        total = total + at_least_float32(one[:0]).sum()
    return total
