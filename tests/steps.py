"""A forward and a backward pass of a loss whose first argument is the student, and the memory saved between them."""

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


def saved_elements(call: Callable[..., Any], *given: Any, **named: Any) -> list[int]:
    """Return the number of elements of every tensor that a call saves for its backward pass."""
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().nbytes() // tensor.itemsize)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(*given, **named)
    return saved
