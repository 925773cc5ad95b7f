"""Helpers of the slow definitions of the methods.

The module ``reference`` of a method defines the method's losses and parts. It shares only these helpers with the fast
code, so that they cannot share a mistake. A slow definition has the arguments of the function of the same name, checks
nothing, computes in float64 and returns float32 or float64. Its docstring gives shapes that differ.
"""

import torch
from torch import Tensor

from ssync_loss._inputs import widest


def unit(vector: Tensor) -> Tensor:
    """Scale a vector to length 1, in float64; a vector without a normal number becomes zero, without gradient."""
    largest = vector.detach().abs().max().double()
    if largest < torch.finfo(torch.promote_types(vector.dtype, torch.float32)).tiny:
        return vector.double() * 0
    vector = vector.double() / largest
    return vector / vector.square().sum().sqrt()


def mean(values: list[Tensor], like: Tensor) -> Tensor:
    """Return the mean; the mean of no values is 0, attached to the graph."""
    return torch.stack(values).mean() if values else like.flatten()[:0].sum().double()


def widened(value: Tensor, *given: Tensor) -> Tensor:
    """Return a value in float64 if an argument has it, else in float32."""
    return value.to(widest(*given))
