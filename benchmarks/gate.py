"""No number for what is wrong: every contender is first compared with the slow definitions."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.add_ons import BY_NAME, Entry
from benchmarks.contenders import COMPILED, MERGE_THRESHOLD, backend_of, ssync_criterion, step_of
from benchmarks.inputs import Inputs, Outputs, Step
from benchmarks.plan import Job, Options
from benchmarks.results import Key, Values
from ssync_loss import PseudoLabels
from ssync_loss.functional import pseudo_labels
from ssync_loss.testing import assert_same_labels, decidable_clips, reference_pseudo_labels

CASE = "agrees with the reference"
# an even and an odd grid, one frame and several, few slots and many; gates are small because loops are slow
SSYNC_SHAPES = (
    {"B": 2, "T": 3, "S": 5, "H": 5, "W": 7},
    {"B": 1, "T": 1, "S": 2, "H": 4, "W": 1},
    {"B": 1, "T": 2, "S": 11, "H": 10, "W": 8},
)
# uneven sides that pools divide, and all else small: the other definitions are loops, too
SHAPE = {"B": 2, "T": 4, "S": 3, "H": 4, "W": 6, "D": 4, "Kp": 5, "weights": 32}
# of the largest magnitude; definitions are computed in float64, and half gradients come back rounded
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}


def plan(contenders: Sequence[tuple[str, str]]) -> list[Job]:
    """Plan a gate for every contender, in a dtype that it is measured in."""
    jobs = []
    for name, dtype in contenders:
        shape = SHAPE | dict(BY_NAME[name].shape) if name in BY_NAME else SSYNC_SHAPES[0]
        jobs.append(Job(check, [Key("gate", CASE, name, tuple(shape.items()), dtype)]))
    return jobs


def check(keys: Sequence[Key], options: Options) -> list[Values]:
    """Compare contenders with their definitions; an AssertionError is the first disagreement."""
    for key in keys:
        if key.contender in BY_NAME:
            check_entry(BY_NAME[key.contender], device=options.device)
            continue
        # compiled, only one criterion is measured, and every shape is a compilation
        compiled = key.contender.endswith(COMPILED)
        for shape in SSYNC_SHAPES[: 1 if compiled else None]:
            here = Inputs(shape, options.device, dtype=key.dtype, drawn_on="cpu")
            labels = partial(pseudo_labels, merge_threshold=MERGE_THRESHOLD, backend=backend_of(key.contender))
            check_labels(labels, here)
            for case in ("step, mse",) if compiled else ("step, mse", "step, cross_entropy"):
                definition = step_of(case, key.contender, Inputs(shape, dtype=key.dtype))
                check_step(step_of(case, key.contender, here), definition, TOLERANCE[key.dtype])
    return [{} for _ in keys]


def check_labels(labels: Callable[..., PseudoLabels], inputs: Inputs) -> None:
    """Compare the labels of a case on which rounding decides nothing."""
    exact = [one.detach().cpu().float() for one in inputs.maps]
    if not decidable_clips(exact[0], merge_threshold=MERGE_THRESHOLD).all():
        raise AssertionError(f"the gate's own case {inputs.size} leaves room for rounding")
    found = labels(*inputs.maps)
    known = reference_pseudo_labels(*exact, merge_threshold=MERGE_THRESHOLD)
    assert_same_labels(type(found)(*(one.cpu() for one in found)), known)


def check_entry(entry: Entry, *, device: str = "cpu") -> None:
    """Compare a method with its definition."""
    settings, shape = {**entry.settings, **entry.gate}, SHAPE | dict(entry.shape)
    # drawn on the CPU, where definitions are at home
    definition = entry.make(Inputs(shape), **settings)
    check_step(entry.make(Inputs(shape, device, drawn_on="cpu"), **settings), definition)


def check_step(step: Step, definition: Step, tolerance: float = TOLERANCE["float32"]) -> None:
    """Compare what a step returns, or changes, and its gradients with what they should be."""
    expected = _as_tuple(definition.expected())
    step.prepare()
    actual = _as_tuple(step.seen(step.forward()))
    pairs = [(one, other, TOLERANCE["float32"]) for one, other in zip(actual, expected, strict=True)]
    if step.leaves:
        grads, wanted = (
            torch.autograd.grad(outputs, side.leaves, side.incoming or torch.ones_like(outputs[0]))
            for outputs, side in ((actual, step), (expected, definition))
        )
        pairs += [(one, other, tolerance) for one, other in zip(grads, wanted, strict=True)]
    for one, other, rtol in pairs:
        scale = other.detach().abs().max().item() if other.is_floating_point() else 0.0
        torch.testing.assert_close(one.cpu(), other, rtol=0.0, atol=rtol * scale)


def _as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def available(contender: str, device: str) -> str:
    """Say why SSync by some backend cannot be had here, or nothing."""
    try:
        ssync_criterion(contender)(*Inputs({"B": 1, "T": 1, "S": 2, "H": 2, "W": 2}, device).maps)
    except (ImportError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split())
    return ""
