"""Rules of settings by name, and one check of all of them."""

from collections.abc import Callable
from functools import partial
from typing import Any

from ssync_loss._checks import check_choice, check_int, check_number

# called with the name of a setting and its value
Rule = Callable[[str, Any], None]


def one_of(*choices: str) -> Rule:
    """Require one of a few names."""
    return partial(check_choice, choices=choices)


def optional(rule: Rule) -> Rule:
    """Accept None, or apply a rule."""

    def check(name: str, value: object) -> None:
        if value is not None:
            rule(name, value)

    return check


POSITIVE = partial(check_number, low=0.0, open_low=True)
NOT_NEGATIVE = partial(check_number, low=0.0)
SHARE = partial(check_number, low=0.0, high=1.0)
COUNT = partial(check_int, low=1)
OPTIONAL_COUNT = optional(COUNT)


def check_by(**rules: Rule) -> Callable[..., None]:
    """Return a check of settings by name; a setting without a rule passes.

    >>> check = check_by(temperature=POSITIVE, chunk_size=OPTIONAL_COUNT)
    >>> check(temperature=0.0, chunk_size=None)
    Traceback (most recent call last):
    ValueError: `temperature` must be finite and above 0.0; got 0.0.
    """

    def check(**settings: Any) -> None:
        for name, value in settings.items():
            if name in rules:
                rules[name](name, value)

    return check
