"""Hints for torch's compiler, and queries of its state."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """Let a compiler call a function while it traces, and take the answer as a constant.

    ``torch.compiler.assume_constant_result`` does the same, but imports the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_traced() -> bool:
    """Tell whether a compiler traces the code."""
    return torch.compiler.is_compiling()


def is_capturing() -> bool:
    """Tell whether a CUDA graph is captured.

    The query opens no device: if it did, forked processes could use none.
    """
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def is_recomputing() -> bool:
    """Tell whether a backward is running, so that an activation checkpoint repeats this forward.

    In compiled code the answer is always False: the code is traced once, and also runs when a checkpoint repeats it.
    """
    return not is_traced() and torch._C._current_graph_task_id() != -1


@constant
def is_exporting() -> bool:
    """Tell whether ``torch.export`` traces, which drops the gradient of an autograd function."""
    if hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_exporting()
    # torch 2.6 lacks that function
    return getattr(sys.modules.get("torch.export._trace"), "_EXPORT_FLAGS", None) is not None
