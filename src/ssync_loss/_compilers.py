"""What the library tells torch's compiler."""

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """Let a compiler call a function while it traces, and take the answer as a constant.

    This is ``torch.compiler.assume_constant_result``, which would import the compiler and all it needs.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
