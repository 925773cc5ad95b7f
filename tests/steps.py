"""A forward and a backward of a loss that teaches its first argument."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def step_of(loss_of: Callable[..., Tensor], source: Tensor, *others: Any, **given: Any) -> tuple[Tensor, Tensor]:
    """Return the loss, and its gradient with respect to the first argument."""
    source = source.detach().requires_grad_()
    loss = loss_of(source, *others, **given)
    (gradient,) = torch.autograd.grad(loss, source)
    return loss.detach(), gradient


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tol: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tol, atol=tol)
