"""Expected error messages."""

import re
from collections.abc import Callable
from typing import Any

import pytest


def refuses(error: type[Exception], message: str, call: Callable[..., object], *given: Any, **named: Any) -> None:
    """Check that a call raises an error whose message begins with these words."""
    with pytest.raises(error, match="^" + re.escape(message)):
        call(*given, **named)
