"""No number for what is wrong: every contender is first compared with the slow definitions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.add_ons import BY_NAME, AddOn, Inputs, Outputs
from benchmarks.contenders import CONTENDERS, MERGE_THRESHOLD, Contender, dense_loss, ssync_criterion
from benchmarks.inputs import dense_inputs, moving_blobs
from ssync_loss.functional import pseudo_labels
from ssync_loss.methods.srl.reference import (
    reference_dense_decoder_alignment_loss,
    reference_dense_encoder_alignment_loss,
)
from ssync_loss.testing import (
    assert_close_gradient,
    assert_close_loss,
    assert_same_labels,
    decidable_clips,
    gradient_scale,
    reference_pseudo_labels,
    reference_ssync,
)

# an even and an odd grid, one frame and several, few slots and many; gates are small because loops are slow
SSYNC_SHAPES = (
    {"B": 2, "T": 3, "S": 5, "H": 5, "W": 7},
    {"B": 1, "T": 1, "S": 2, "H": 4, "W": 1},
    {"B": 1, "T": 2, "S": 11, "H": 10, "W": 8},
)
DENSE_SHAPE = {"B": 2, "T": 4, "S": 3, "H": 3, "W": 4}
DENSE_DIM = 6
# of the gradient's scale; half gradients come back rounded
GRADIENT_TOL = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DENSE_RTOL = 2e-5

# uneven sides that pools divide, and all else small: the definitions of add-ons are loops, too
ADD_ON_SHAPE = {"B": 2, "T": 4, "S": 3, "H": 4, "W": 6, "D": 4, "Kp": 5, "weights": 32}
# of the largest magnitude; definitions are computed in float64
ADD_ON_RTOL = 1e-5

Criterion = Callable[[Tensor, Tensor], Tensor]
Labels = Callable[[Tensor, Tensor], Any]


def gate(contender: str, dtype: str, device: str) -> str:
    """Compare a contender by its name; return what is wrong, or nothing."""
    chosen, precision = CONTENDERS[contender], getattr(torch, dtype)
    try:
        if chosen.backend is None:
            check_dense(chosen, device=device)
        else:
            backend: Any = chosen.backend
            # compiled, only one criterion is measured, and every shape is a compilation
            for criterion in ("mse",) if chosen.compiled else ("mse", "cross_entropy"):
                check_ssync(
                    ssync_criterion(chosen, criterion=criterion),
                    lambda enc, dec: pseudo_labels(enc, dec, merge_threshold=MERGE_THRESHOLD, backend=backend),
                    criterion=criterion,
                    dtype=precision,
                    device=device,
                    shapes=SSYNC_SHAPES[:1] if chosen.compiled else SSYNC_SHAPES,
                )
    except AssertionError as error:
        return " ".join(str(error).split())[:500] or "disagrees with the reference"
    return ""


def gate_add_on(contender: str, device: str) -> str:
    """Compare an add-on by its name; return what is wrong, or nothing."""
    try:
        check_add_on(BY_NAME[contender], device=device)
    except AssertionError as error:
        return " ".join(str(error).split())[:500] or "disagrees with the reference"
    return ""


def check_ssync(
    loss: Criterion,
    labels: Labels,
    *,
    criterion: str = "mse",
    dtype: torch.dtype = torch.float32,
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
        clips = decidable_clips(exact[0], merge_threshold=MERGE_THRESHOLD)
        if not clips.all():
            raise AssertionError(f"the gate's own case {shape} leaves room for rounding")
        expected_labels = reference_pseudo_labels(exact[0], exact[1], merge_threshold=MERGE_THRESHOLD)
        actual_labels = labels(enc, dec)
        assert_same_labels(type(actual_labels)(*(one.cpu() for one in actual_labels)), expected_labels)

        expected = reference_ssync(exact[0], exact[1], merge_threshold=MERGE_THRESHOLD, criterion=criterion)
        total = expected.boundary + expected.interior
        actual = loss(enc, dec)
        assert_close_loss(actual.detach().cpu(), total.detach())
        wanted = torch.autograd.grad(total, exact)
        regions = (expected.labels.interior, expected.labels.boundary)
        for one, other, region in zip(torch.autograd.grad(actual, (enc, dec)), wanted, regions, strict=True):
            scale = gradient_scale(region, shape["S"], criterion=criterion)
            assert_close_gradient(one.cpu(), other, scale=scale, tol=GRADIENT_TOL[dtype])


def check_dense(contender: Contender, *, device: str) -> None:
    """Compare the loss and both gradients of dense alignment with its definition.

    Raises:
        AssertionError: at the first disagreement.
    """
    # windows of one row at a time, so that a chunked contender is cut here, too
    chunk_size = None if contender.chunk_size is None else 5
    small = Contender(contender.name, group_frames=contender.group_frames, chunk_size=chunk_size)
    inputs = dense_inputs(DENSE_SHAPE, dim=DENSE_DIM, device=device)
    leaves = [inputs.decoder_features, inputs.encoder_features]
    actual = dense_loss(small, *inputs)
    exact = [one.detach().cpu().requires_grad_(one.requires_grad) for one in inputs]
    settings: dict[str, Any] = {"group_frames": contender.group_frames}
    expected = reference_dense_decoder_alignment_loss(exact[0], exact[2], exact[3], **settings)
    expected = expected + reference_dense_encoder_alignment_loss(exact[1], exact[2], exact[4], **settings)
    torch.testing.assert_close(actual.detach().cpu(), expected.detach(), rtol=DENSE_RTOL, atol=0.0)
    wanted = torch.autograd.grad(expected, exact[:2])
    for one, other in zip(torch.autograd.grad(actual, leaves), wanted, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(one.cpu(), other, rtol=0.0, atol=DENSE_RTOL * scale)


def check_add_on(add_on: AddOn, *, device: str = "cpu") -> None:
    """Compare what an add-on returns, or changes, and its gradients with its definition.

    Raises:
        AssertionError: at the first disagreement.
    """
    settings = {**add_on.settings, **add_on.gate_settings}
    shape = ADD_ON_SHAPE | add_on.gate_shape
    # drawn on the CPU, where definitions are at home
    definition = add_on.make(Inputs(shape), **settings)
    step = add_on.make(Inputs(shape, device, drawn_on="cpu"), **settings)
    expected = _as_tuple(definition.expected())
    step.before()
    actual = _as_tuple(step.seen(step.forward()))
    for one, other in zip(actual, expected, strict=True):
        _assert_close(one, other)
    if step.leaves:
        grads, wanted = (
            torch.autograd.grad(outputs, side.leaves, side.incoming or torch.ones_like(outputs[0]))
            for outputs, side in ((actual, step), (expected, definition))
        )
        for one, other in zip(grads, wanted, strict=True):
            _assert_close(one, other)


def _as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _assert_close(actual: Tensor, expected: Tensor) -> None:
    exact = not expected.is_floating_point()
    scale = 0.0 if exact else expected.detach().abs().max().item()
    torch.testing.assert_close(actual.cpu(), expected, rtol=0.0, atol=ADD_ON_RTOL * scale)


def available(backend: str, device: str) -> str:
    """Say why a backend of SSync cannot be had here, or nothing."""
    maps = moving_blobs({"B": 1, "T": 1, "S": 2, "H": 2, "W": 2}, device=device)
    try:
        ssync_criterion(CONTENDERS[f"SSync {backend}"])(*maps)
    except (ImportError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split())
    return ""
