"""Run ``backend="auto"`` with plain torch, and with the C library."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest

from ssync_loss.ssync.engines import FAST


def by_torch() -> AbstractContextManager[Any]:
    """Disable the fast engines."""
    return mock.patch.dict(FAST, clear=True)


def by_c() -> AbstractContextManager[Any]:
    """Select the C library, as ``"auto"`` does on a CPU."""
    return mock.patch.dict(FAST, {"cpu": "cpu"})


ENGINES_IN_TURN = pytest.mark.parametrize("engine", [by_torch, by_c])
