"""Functions with hand-written gradients: calls are fast, and a second derivative is an error."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from ssync_loss._autocast import at_least_float32
from ssync_loss._compilers import is_exporting

Backward: TypeAlias = Callable[..., "tuple[Tensor | None, ...]"]


def differentiable(
    operator: CustomOpDef, compute: Callable[..., Any], save: Callable[..., None], derive: Backward
) -> Callable[..., Any]:
    """Give an operator of torch a gradient, and return the function to call instead of the operator.

    ``torch.func.grad`` ignores the gradient of an operator, and its forward derivative would silently be 0. An autograd
    function works with ``torch.func.grad``, and refuses the forward derivative. A compiler gets the operator.

    Args:
        operator: the operator, for compilers and fake tensors.
        compute: the operator's function. Plain tensors call it directly, as the dispatcher doubles the time of a call.
        save: ``setup_context`` of the gradient.
        derive: ``backward`` of the gradient.
    """
    operator.register_autograd(derive, setup_context=save)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return operator(*inputs)

        setup_context = staticmethod(save)
        backward = staticmethod(derive)

    class Plain(torch.autograd.Function):
        """The same function in a form that `torch.func` refuses; a call takes half the time."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = compute(*inputs)
            save(ctx, inputs, output)
            return output

        backward = staticmethod(derive)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return operator(*inputs)
        # `apply` has no types
        function: Callable[..., Any] = Plain.apply if _are_plain(inputs) else Differentiable.apply
        return function(*inputs)

    return call


def plain(operator: CustomOpDef, compute: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function to call instead of an operator without a gradient.

    On plain tensors it calls ``compute``: the dispatcher adds 10 to 20 microseconds to a call, and imports Dynamo.
    """

    def call(*inputs: Any) -> Any:
        is_traced = torch.compiler.is_compiling() or torch._C._is_tracing()
        return (compute if not is_traced and _are_plain(inputs) else operator)(*inputs)

    return call


def learns(tensor: Tensor) -> bool:
    """Tell whether a forward must write a gradient.

    It must in an exported program, and within ``torch.func``, where ``requires_grad`` describes only one level.
    """
    if not torch.is_grad_enabled():
        return False
    return tensor.requires_grad or torch._C._are_functorch_transforms_active() or is_exporting()


def exportable(function: type[torch.autograd.Function]) -> Callable[..., Tensor]:
    """Return the function to call instead of ``apply``; an exported program differentiates the forward."""

    def call(*inputs: Any) -> Tensor:
        output: Tensor = function.forward(*inputs) if is_exporting() else function.apply(*inputs)
        return output

    return call


def savable(tensor: Tensor) -> Tensor:
    """Return a tensor that a backward may save: outside of inference mode, a copy of an inference tensor."""
    # a compiler may save any tensor
    fits = torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not tensor.is_inference()
    return tensor if fits else tensor.clone()


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


def _are_plain(inputs: tuple[Any, ...]) -> bool:
    """Tell whether all tensors are ordinary tensors, and no mode observes the calls."""
    tensors = [one for one in inputs if isinstance(one, Tensor)]
    plain = all(type(one) is Tensor and not one.is_neg() and not one._is_zerotensor() for one in tensors)
    # the tensors of `is_grads_batched` have no memory
    plain = plain and all(map(torch._C._has_storage, tensors))
    watched = torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0
    return plain and not watched


def once_differentiable(backward: Backward) -> Backward:
    """Make it an error to differentiate the gradients that a backward returns.

    torch's decorator of this name does so only if the incoming gradient can be differentiated. The incoming gradient of
    a loss is usually the constant 1, and a Hessian would silently be 0. One of the saved tensors must have a graph: an
    input or an output of the function.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        # without gradients, or in a compiler, the backward has no graph
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *incoming)
        with torch.no_grad():
            grads = backward(ctx, *incoming)
        sources = [one for one in ctx.saved_tensors if one is not None and one.requires_grad]
        return tuple(None if grad is None or not sources else _dead_end(grad, sources[0]) for grad in grads)

    return wrapped


class _DeadEnd(torch.autograd.Function):
    """Return a gradient with a graph whose backward is an error."""

    @staticmethod
    def forward(grad: Tensor, source: Tensor) -> Tensor:  # noqa: ARG004 (autograd sees it)
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004 (it ends here)
        raise RuntimeError(
            "This loss has no second derivative, but its gradient was differentiated. Leave the loss out of gradient "
            "penalties and Hessians."
        )


# `apply` has no types
_dead_end: Callable[[Tensor, Tensor], Tensor] = _DeadEnd.apply
