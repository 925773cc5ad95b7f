"""Gradients that are written out by hand: their functions are called fast, and have no second derivative."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from inspect import signature
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

Backward: TypeAlias = Callable[..., tuple[Tensor | None, ...]]
Function = TypeVar("Function", bound=type[torch.autograd.Function])


def once_differentiable(backward: Backward) -> Backward:
    """Make it an error to differentiate the gradients that a backward returns.

    torch's own decorator does so only where the gradient that came in can be differentiated. A loss is mostly
    differentiated from a constant 1, and there a Hessian would silently be 0. The tensors that were saved must
    begin with those the gradients belong to, in their order.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        # a graph of the backward is made only on demand
        if not torch.is_grad_enabled():
            return backward(ctx, *incoming)
        with torch.no_grad():
            grads = backward(ctx, *incoming)
        # and never by a compiler
        if torch.compiler.is_compiling():
            return grads
        sources = [*ctx.saved_tensors, *[None] * len(grads)]
        return tuple(
            None if grad is None else _dead_end(grad, source) for grad, source in zip(grads, sources, strict=False)
        )

    return wrapped


def signature_kept(function: Function) -> Function:
    """Keep the signature of a forward, by which torch binds the arguments of every call.

    It would be put together each time, which takes longer than many an operator.
    """
    forward: Any = function.forward
    forward.__signature__ = signature(forward)
    return function


def untracked() -> AbstractContextManager[None]:
    """Compute what nobody differentiates or writes into without autograd's bookkeeping.

    For small tensors that is a tenth of the time. What leaves must have been there before, or be computed outside.
    """
    return nullcontext() if torch.compiler.is_compiling() else torch.inference_mode()


class Slopes:
    """Which slopes are as the forward wrote them, so that a backward may scale them in place.

    With ``torch.func`` the graphs of all levels hold the same memory: the first to come may have it, all others
    compute it again.
    """

    def __init__(self) -> None:
        self._taken: set[int] = set()

    def take(self, number: int) -> bool:
        """Tell whether nobody has taken a slope before, and take it."""
        is_first = number not in self._taken
        self._taken.add(number)
        return is_first


class _DeadEnd(torch.autograd.Function):
    """A gradient as it is, with a graph that leads nowhere."""

    @staticmethod
    def forward(grad: Tensor, source: Tensor) -> Tensor:  # noqa: ARG004 (autograd sees it)
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004 (it ends here)
        raise RuntimeError(
            "This loss has no second derivative: its gradient is written out by hand, and was differentiated. "
            "Leave the loss out of what is differentiated twice (a gradient penalty, a Hessian)."
        )


# typed: autograd's own `apply` is not
_dead_end: Callable[[Tensor, Tensor], Tensor] = _DeadEnd.apply
