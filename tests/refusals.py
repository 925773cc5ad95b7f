"""Expected error messages."""

import re
from collections.abc import Callable
from typing import Any

import pytest


def refuses(error: type[Exception], message: str, call: Callable[..., object], *given: Any, **named: Any) -> None:
    """The message begins with these words, and names the argument, what was wanted and what came."""
    with pytest.raises(error, match="^" + re.escape(message)):
        call(*given, **named)
