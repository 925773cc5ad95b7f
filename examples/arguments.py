"""Command-line options with bounds, and errors that end a command with one line."""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# a frame has 48 x 48 pixels in patches of 4 x 4
NUM_PATCHES = 144


class Rule(NamedTuple):
    """A condition on a number, in words and as a function."""

    wanted: str
    holds: Callable[[float], bool]


def at_least(low: float) -> Rule:
    """Bound a number from below."""
    return Rule(f"at least {low}", lambda value: value >= low)


def above(low: float) -> Rule:
    """Bound a number from below, without the bound itself."""
    return Rule(f"above {low}", lambda value: value > low)


def at_most(high: float, why: str = "") -> Rule:
    """Bound a number from above, and give the reason."""
    return Rule(f"at most {high}{why}", lambda value: value <= high)


def within(low: float, high: float) -> Rule:
    """Bound a number from both sides."""
    return Rule(f"within [{low}, {high}]", lambda value: low <= value <= high)


class Bounded(argparse.Action):
    """An option whose numbers follow rules and differ from each other.

    >>> parser = argparse.ArgumentParser()
    >>> _ = parser.add_argument("--slots", type=int, action=Bounded, rules=[at_least(1)])
    >>> parser.parse_args(["--slots", "3"]).slots
    3
    """

    def __init__(self, option_strings: Sequence[str], dest: str, *, rules: Sequence[Rule], **settings: Any) -> None:
        super().__init__(option_strings, dest, **settings)
        self.rules = rules

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: object) -> None:
        """Store the values, or end the command with an error."""
        name = self.option_strings[0]
        given = values if isinstance(values, list) else [values]
        for value in given:
            for rule in self.rules:
                if not rule.holds(value):
                    parser.error(f"{name} must be {rule.wanted}; got {value}")
        if len(set(given)) < len(given):
            parser.error(f"{name} must differ from each other; got {' '.join(map(str, given))}")
        setattr(namespace, self.dest, values)


def add_training_options(parser: argparse.ArgumentParser, *, steps: int, slots: int) -> None:
    """Add the options that the examples share.

    Args:
        parser: parser of the command line.
        steps: default number of steps.
        slots: default number of slots.
    """
    add = parser.add_argument
    # the order of the clips is drawn from a million times the seed, which must fit 64 bits
    seeds = [at_least(0), at_most(2**32 - 1)]
    add("--seeds", type=int, nargs="+", default=[0], action=Bounded, rules=seeds, help="training seeds")
    rules = [at_least(1), at_most(NUM_PATCHES, ", the patches of a frame")]
    add("--slots", type=int, default=slots, action=Bounded, rules=rules, help="number of slots")
    rules = [at_least(10), at_most(1_000_000)]
    add("--steps", type=int, default=steps, action=Bounded, rules=rules, help="optimizer steps of a run")
    add("--quick", action="store_true", help="a rehearsal in seconds; its numbers mean nothing")
    add_threads(parser, at_least(1), help="CPU threads; operators this small gain nothing from a second thread")
    add("--table", type=Path, metavar="RESULTS.JSON", help="only print the table of finished results")


def add_threads(parser: argparse.ArgumentParser, low: Rule, *, help: str) -> None:  # noqa: A002 (as argparse has it)
    """Add the number of threads. More threads than CPUs would wait for each other without end."""
    rules = [low, at_most(num_cpus(), ", the CPUs of this machine")]
    parser.add_argument("--threads", type=int, default=1, action=Bounded, rules=rules, help=help)


def num_cpus() -> int:
    """Count the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def explained(
    kinds: type[Exception] | tuple[type[Exception], ...] = (ValueError, ImportError, OSError),
) -> Iterator[None]:
    """End the program with one line, not a traceback, if the user's files or options are at fault.

    Args:
        kinds: errors that the user can fix.
    """
    try:
        yield
    except kinds as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from error
