"""No number for what is wrong: every contender is first compared with the slow definitions."""

from collections.abc import Sequence

import torch

from benchmarks.add_ons import BY_NAME
from benchmarks.contenders import COMPILED, OPERATIONS, STEP, ssync_criterion, step_of
from benchmarks.inputs import Inputs, Step, as_tuple
from benchmarks.plan import Job, Options
from benchmarks.results import Key, Values

CASE = "agrees with the reference"
# an even and an odd grid, one frame and several, few slots and many; rounding decides no label of them
SSYNC_SHAPES = (
    {"B": 2, "T": 3, "S": 5, "H": 5, "W": 7},
    {"B": 1, "T": 1, "S": 2, "H": 4, "W": 1},
    {"B": 1, "T": 2, "S": 11, "H": 10, "W": 8},
)
# uneven sides that pools divide, and all else small: definitions are loops
SHAPE = {"B": 2, "T": 4, "S": 3, "H": 2, "W": 6, "D": 4, "Kp": 5, "weights": 32}
# of the largest magnitude; definitions are computed in float64, and half gradients come back rounded
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}


def plan(contenders: Sequence[tuple[str, str]]) -> list[Job]:
    """Plan a gate for every contender, in a dtype that it is measured in."""
    return [Job(check, [Key("gate", CASE, name, tuple(_shapes(name)[0].items()), dtype)]) for name, dtype in contenders]


def _shapes(name: str) -> Sequence[dict[str, int]]:
    if name in BY_NAME:
        return [SHAPE | dict(BY_NAME[name].shape)]
    # every shape is a compilation
    return SSYNC_SHAPES[: 1 if name.endswith(COMPILED) else None]


def check(keys: Sequence[Key], options: Options) -> list[Values]:
    """Compare a contender with its definitions; an AssertionError is the first disagreement."""
    (key,) = keys
    # compiled, one operation is measured; and a method is one
    one = key.contender in BY_NAME or key.contender.endswith(COMPILED)
    for shape in _shapes(key.contender):
        for case in (STEP,) if one else OPERATIONS:
            here, there = (Inputs(shape, device, dtype=key.dtype) for device in (options.device, "cpu"))
            step, definition = (step_of(case, key.contender, inputs, gate=True) for inputs in (here, there))
            check_step(step, definition, TOLERANCE[key.dtype])
    return [{}]


def check_step(step: Step, definition: Step, tolerance: float = TOLERANCE["float32"]) -> None:
    """Compare what a step returns, or changes, and its gradients with what they should be."""
    expected = as_tuple(definition.expected())
    step.prepare()
    actual = as_tuple(step.seen(step.forward()))
    pairs = [(one, other, TOLERANCE["float32"]) for one, other in zip(actual, expected, strict=True)]
    if step.leaves:
        gradients = zip(step.gradients(actual), definition.gradients(expected), strict=True)
        pairs += [(one, other, tolerance) for one, other in gradients]
    for one, other, rtol in pairs:
        scale = other.detach().abs().max().item() if other.is_floating_point() else 0.0
        torch.testing.assert_close(one.cpu(), other, rtol=0.0, atol=rtol * scale)


def missing(contender: str, device: str) -> str:
    """Say why SSync by some backend cannot be had here, or nothing."""
    try:
        ssync_criterion(contender)(*Inputs({"B": 1, "T": 1, "S": 2, "H": 2, "W": 2}, device).maps)
    except (ImportError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split())
    return ""
