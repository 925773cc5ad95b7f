"""What the slow definitions of the methods share.

The module ``reference`` of a method says what its losses and parts compute, and the others say it fast. Nothing but
this is shared, so that a mistake has to be made twice to go unnoticed. A slow definition takes what the function of
that name takes, checks nothing, computes in float64 and returns float32 or wider; shapes are said where they differ.
"""

import torch
from torch import Tensor

from ssync_loss._inputs import widest


def unit(vector: Tensor) -> Tensor:
    """Scale a vector to length 1, in float64; one without a normal number becomes zero, without gradient."""
    largest = vector.detach().abs().max().double()
    if largest < torch.finfo(torch.promote_types(vector.dtype, torch.float32)).tiny:
        return vector.double() * 0
    vector = vector.double() / largest
    return vector / vector.square().sum().sqrt()


def mean(values: list[Tensor], like: Tensor) -> Tensor:
    """Return the mean, and an attached 0 of nothing."""
    return torch.stack(values).mean() if values else like.flatten()[:0].sum().double()


def widened(value: Tensor, *given: Tensor) -> Tensor:
    """Return a value in float32, or float64 if something given is."""
    return value.to(widest(*given))
