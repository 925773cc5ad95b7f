"""No number for what is wrong: every contender is first compared with the slow definitions."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.add_ons import BY_NAME, Entry
from benchmarks.contenders import COMPILED, MERGE_THRESHOLD, backend_of, ssync_criterion
from benchmarks.inputs import Inputs, moving_blobs
from benchmarks.plan import Job, Options
from benchmarks.results import Key, Values
from ssync_loss.functional import pseudo_labels
from ssync_loss.testing import (
    assert_close_gradient,
    assert_close_loss,
    assert_same_labels,
    decidable_clips,
    gradient_scale,
    reference_pseudo_labels,
    reference_ssync,
)

CASE = "agrees with the reference"
# an even and an odd grid, one frame and several, few slots and many; gates are small because loops are slow
SSYNC_SHAPES = (
    {"B": 2, "T": 3, "S": 5, "H": 5, "W": 7},
    {"B": 1, "T": 1, "S": 2, "H": 4, "W": 1},
    {"B": 1, "T": 2, "S": 11, "H": 10, "W": 8},
)
# of the gradient's scale; half gradients come back rounded
GRADIENT_TOL = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 2e-2}
# uneven sides that pools divide, and all else small: the other definitions are loops, too
SHAPE = {"B": 2, "T": 4, "S": 3, "H": 4, "W": 6, "D": 4, "Kp": 5, "weights": 32}
# of the largest magnitude; definitions are computed in float64
RTOL = 1e-5

Criterion = Callable[[Tensor, Tensor], Tensor]
Labels = Callable[[Tensor, Tensor], Any]


def plan(contenders: Sequence[tuple[str, str]]) -> list[Job]:
    """Plan a gate for every contender, in a dtype that it is measured in."""
    jobs = []
    for name, dtype in contenders:
        shape = SHAPE | dict(BY_NAME[name].shape) if name in BY_NAME else SSYNC_SHAPES[0]
        jobs.append(Job(check, [Key("gate", CASE, name, tuple(shape.items()), dtype)]))
    return jobs


def check(keys: Sequence[Key], options: Options) -> list[Values]:
    """Compare contenders with their definitions.

    Raises:
        AssertionError: at the first disagreement.
    """
    for key in keys:
        name = key.contender
        if name in BY_NAME:
            check_entry(BY_NAME[name], device=options.device)
            continue
        compiled, backend = name.endswith(COMPILED), backend_of(name)
        # compiled, only one criterion is measured, and every shape is a compilation
        for criterion in ("mse",) if compiled else ("mse", "cross_entropy"):
            check_ssync(
                ssync_criterion(name, criterion=criterion),
                partial(pseudo_labels, merge_threshold=MERGE_THRESHOLD, backend=backend),
                criterion=criterion,
                dtype=key.dtype,
                device=options.device,
                shapes=SSYNC_SHAPES[:1] if compiled else SSYNC_SHAPES,
            )
    return [{} for _ in keys]


def check_ssync(
    loss: Criterion,
    labels: Labels,
    *,
    criterion: str = "mse",
    dtype: str = "float32",
    device: str = "cpu",
    shapes: Sequence[dict[str, int]] = SSYNC_SHAPES,
) -> None:
    """Compare labels, loss and both gradients with the reference.

    Raises:
        AssertionError: at the first disagreement.
    """
    for number, shape in enumerate(shapes):
        # drawn on the CPU: the same case everywhere
        drawn = moving_blobs(shape, dtype=dtype, seed=number)
        enc, dec = (one.detach().to(device).requires_grad_() for one in drawn)
        # the reference in the precision that the library computes in, on the numbers that the library gets
        exact = [one.detach().cpu().float().requires_grad_() for one in (enc, dec)]
        if not decidable_clips(exact[0], merge_threshold=MERGE_THRESHOLD).all():
            raise AssertionError(f"the gate's own case {shape} leaves room for rounding")
        found = labels(enc, dec)
        known = reference_pseudo_labels(exact[0], exact[1], merge_threshold=MERGE_THRESHOLD)
        assert_same_labels(type(found)(*(one.cpu() for one in found)), known)

        expected = reference_ssync(exact[0], exact[1], merge_threshold=MERGE_THRESHOLD, criterion=criterion)
        total = expected.boundary + expected.interior
        actual = loss(enc, dec)
        assert_close_loss(actual.detach().cpu(), total.detach())
        wanted = torch.autograd.grad(total, exact)
        regions = (expected.labels.interior, expected.labels.boundary)
        for one, other, region in zip(torch.autograd.grad(actual, (enc, dec)), wanted, regions, strict=True):
            scale = gradient_scale(region, shape["S"], criterion=criterion)
            assert_close_gradient(one.cpu(), other, scale=scale, tol=GRADIENT_TOL[dtype])


def check_entry(entry: Entry, *, device: str = "cpu") -> None:
    """Compare what a method returns, or changes, and its gradients with its definition.

    Raises:
        AssertionError: at the first disagreement.
    """
    settings, shape = {**entry.settings, **entry.gate}, SHAPE | dict(entry.shape)
    # drawn on the CPU, where definitions are at home
    definition = entry.make(Inputs(shape), **settings)
    step = entry.make(Inputs(shape, device, drawn_on="cpu"), **settings)
    expected = _as_tuple(definition.expected())
    step.before()
    actual = _as_tuple(step.seen(step.forward()))
    pairs = list(zip(actual, expected, strict=True))
    if step.leaves:
        grads, wanted = (
            torch.autograd.grad(outputs, side.leaves, side.incoming or torch.ones_like(outputs[0]))
            for outputs, side in ((actual, step), (expected, definition))
        )
        pairs += zip(grads, wanted, strict=True)
    for one, other in pairs:
        scale = other.detach().abs().max().item() if other.is_floating_point() else 0.0
        torch.testing.assert_close(one.cpu(), other, rtol=0.0, atol=RTOL * scale)


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def available(contender: str, device: str) -> str:
    """Say why SSync by some backend cannot be had here, or nothing."""
    maps = moving_blobs({"B": 1, "T": 1, "S": 2, "H": 2, "W": 2}, device=device)
    try:
        ssync_criterion(contender)(*maps)
    except (ImportError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split())
    return ""
