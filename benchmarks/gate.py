"""The gate: a contender is compared with the slow definitions before it is measured."""

import os
from collections.abc import Sequence

import torch
from examples.inputs import Inputs, Step, as_tuple

from benchmarks.add_ons import BY_NAME
from benchmarks.contenders import COMPILED, OPERATIONS, STEP, name_of, ssync_criterion, step_of
from benchmarks.plan import Job, Options, attempt
from benchmarks.results import Key, Row

CASE = "agrees with the reference"
# grids even and odd, one frame and several, few slots and many. Rounding decides none of their labels
SSYNC_SHAPES = (
    {"B": 2, "T": 3, "S": 5, "H": 5, "W": 7},
    {"B": 1, "T": 1, "S": 2, "H": 4, "W": 1},
    {"B": 1, "T": 2, "S": 11, "H": 10, "W": 8},
)
# pools divide the sides. Definitions are slow loops
SHAPE = {"B": 2, "T": 4, "S": 3, "H": 4, "W": 6, "D": 4, "Kp": 5, "weights": 32}
# relative to the largest magnitude of what is compared; gradients of half precision are rounded
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}


def plan(contenders: Sequence[tuple[str, str]]) -> list[Job]:
    """Plan a job for each contender and dtype."""
    return [Job([Key("gate", CASE, name, tuple(_shapes(name)[0].items()), dtype)], check) for name, dtype in contenders]


def _shapes(name: str) -> Sequence[dict[str, int]]:
    if name in BY_NAME:
        return [SHAPE]
    # every shape is a compilation
    return SSYNC_SHAPES[: 1 if name.endswith(COMPILED) else None]


def check(keys: Sequence[Key], options: Options) -> list[Row]:
    """Compare contenders with their definitions."""
    return [Row(key, *attempt(_agree, key, options.device)[:2]) for key in keys]


def _agree(key: Key, device: str) -> None:
    # a method has one operation, and compiled code is measured by its step
    one = key.contender in BY_NAME or key.contender.endswith(COMPILED)
    for shape in _shapes(key.contender):
        for case in (STEP,) if one else OPERATIONS:
            here, there = (Inputs(shape, where, dtype=key.dtype) for where in (device, "cpu"))
            step, definition = (step_of(case, key.contender, inputs, gate=True) for inputs in (here, there))
            check_step(step, definition, TOLERANCE[key.dtype])


def check_step(step: Step, definition: Step, tolerance: float = TOLERANCE["float32"]) -> None:
    """Compare the outputs of a step and its gradients with the definition; an AssertionError says a difference."""
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
    """Say why SSync cannot run on this backend here, or nothing."""
    if contender == name_of("triton") and os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET is 1"
    try:
        ssync_criterion(contender)(*Inputs({"B": 1, "T": 1, "S": 2, "H": 2, "W": 2}, device).maps)
    except (ImportError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split())
    return ""
