"""What is computed operator by operator, and the way that is written for a compiler, without one."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch


def as_compiled() -> AbstractContextManager[Any]:
    """Make the library believe that it is being compiled: everything in one piece, fused criteria."""
    return mock.patch.object(torch.compiler, "is_compiling", return_value=True)


WAYS = pytest.mark.parametrize("way", [nullcontext, as_compiled])
