"""What is refused, and in which words."""

import re
from collections.abc import Callable
from typing import Any

import pytest


def refuses(error: type[Exception], message: str, call: Callable[..., object], *given: Any, **named: Any) -> None:
    """The message begins with these words; it names the argument, the wanted and the given."""
    with pytest.raises(error, match="^" + re.escape(message)):
        call(*given, **named)
