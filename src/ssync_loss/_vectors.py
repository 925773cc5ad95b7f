"""Helpers of the contrastive losses: directions, products, values with known gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssync_loss._autocast import no_autocast
from ssync_loss._autograd import exportable, once_differentiable
from ssync_loss._compilers import is_exporting

# squares of entries between these bounds neither overflow nor underflow
SQUARABLE = (1e-15, 1e15)


def directions(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Scale vectors (..., D) to length 1, and return the unit vectors and the inverse lengths (..., 1).

    A zero vector stays zero, with inverse length 0 and gradient 0. A vector counts as zero if all entries are below the
    smallest normal number, 1e-38 in float32. NaN and infinity give NaN.
    """
    with torch.no_grad():
        low, high = vectors.aminmax(dim=-1, keepdim=True)
        largest = torch.maximum(high, -low)
        zero = largest < torch.finfo(vectors.dtype).tiny
        plain = (largest > SQUARABLE[0]) & (largest < SQUARABLE[1])
        # division by infinity makes a vector and its gradient zero
        scale = torch.where(zero, float("inf"), torch.where(plain, 1.0, largest))
    vectors = vectors / scale
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).masked_fill(zero, 1.0)
    return vectors / length, 1 / length / scale


def through_lengths(slope: Tensor, units: Tensor, inverse: Tensor) -> Tensor:
    """Turn the gradient with respect to directions into the gradient with respect to vectors, in place.

    The result has no component along a vector, as directions do not depend on lengths.
    """
    along = (slope * units).sum(-1, keepdim=True)
    return slope.addcmul_(units, along, value=-1).mul_(inverse)


class _Products(torch.autograd.Function):
    """``left @ right.mT``, with a backward outside autocast."""

    @staticmethod
    def forward(left: Tensor, right: Tensor) -> Tensor:
        return left @ right.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004 (torch's name)
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        with no_autocast(grad):
            return grad @ right, grad.mT @ left


class _KnownGradient(torch.autograd.Function):
    """Attach a value to a tensor, with a given gradient."""

    @staticmethod
    def forward(source: Tensor, value: Tensor, slope: Tensor) -> Tensor:  # noqa: ARG004 (for the backward)
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004 (torch's name)
        source, _, slope = inputs
        ctx.save_for_backward(source, slope)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        source, slope = ctx.saved_tensors
        return (grad * slope).to(source.dtype), None, None


products: Callable[[Tensor, Tensor], Tensor] = exportable(_Products)
# `apply` has no types
_known_gradient: Callable[[Tensor, Tensor, Tensor], Tensor] = _KnownGradient.apply


def known_gradient(source: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """Attach a value to a tensor, with the gradient ``slope``."""
    if not is_exporting():
        return _known_gradient(source, value, slope)
    # where the slope is 0, the source may be NaN
    source = torch.where(slope == 0, 0.0, source.to(slope.dtype))
    return value + ((source - source.detach()) * slope).sum()
