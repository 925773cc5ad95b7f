"""What the library tells torch's compiler, and asks it."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """Let a compiler call a function while it traces, and take the answer as a constant.

    This is ``torch.compiler.assume_constant_result``, which would import the compiler and all it needs.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_traced() -> bool:
    """Tell whether a compiler reads the code, rather than runs it."""
    return torch.compiler.is_compiling()


def is_recomputing() -> bool:
    """Tell whether a backward is running: a forward is then one that an activation checkpoint repeats.

    What is compiled cannot tell: its code is read once, and runs in both.
    """
    return not is_traced() and torch._C._current_graph_task_id() != -1


@constant
def is_exporting() -> bool:
    """Tell whether ``torch.export`` traces: of an autograd function it keeps what is computed, but no gradient."""
    if hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_exporting()
    # torch 2.6
    return getattr(sys.modules.get("torch.export._trace"), "_EXPORT_FLAGS", None) is not None
