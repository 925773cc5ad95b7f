"""Temporal slot contrast: published values, the reference, values computed by hand, errors."""

import math
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contract import Case, LossContract
from golden_neighbors import Golden, golden_names
from ssync_loss import TemporalSlotContrastLoss
from ssync_loss.functional import temporal_slot_contrast_loss
from ssync_loss.methods.srl.reference import reference_temporal_slot_contrast_loss
from steps import assert_same, step_of

KINDS = pytest.mark.parametrize("kind", ["adjacent", "supervised"])
NEGATIVES = pytest.mark.parametrize("negatives", ["batch", "video"])


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return slots (B, T, S, D) that change little over time."""
    clips, frames, num_slots, channels = shape or (2, 3, 4, 5)
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(clips, 1, num_slots, channels, generator=generator, dtype=torch.float64)
    moving = torch.randn(clips, frames, num_slots, channels, generator=generator, dtype=torch.float64)
    return (still + 0.3 * moving).to(dtype).requires_grad_()


def step(slots: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    return step_of(temporal_slot_contrast_loss, slots, **given)


# --- values ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", golden_names("temporal_", 5))
def test_published_numbers(name: str, dtype: torch.dtype) -> None:
    golden = Golden(name)
    slots = golden.tensor("slots", dtype).requires_grad_()
    loss = temporal_slot_contrast_loss(
        slots,
        temperature=golden.number("tau"),
        kind=golden.text("kind", "adjacent"),  # type: ignore[arg-type]
        negatives=golden.text("negatives", "batch"),  # type: ignore[arg-type]
    )
    golden.assert_same_step(loss, slots, "slots")


@KINDS
@NEGATIVES
@settings(max_examples=25)
@given(
    shape=st.tuples(*(st.sampled_from(sizes) for sizes in ((1, 2, 3), (1, 2, 3, 4), (1, 2, 3), (1, 3)))),
    seed=st.integers(0, 2**32 - 1),
    temperature=st.sampled_from((0.1, 0.003, 2.0)),
    empty=st.booleans(),
)
def test_value_and_gradient_equal_the_reference(
    kind: str, negatives: str, shape: tuple[int, ...], seed: int, temperature: float, empty: bool
) -> None:
    slots = sample(*shape, dtype=torch.float64, seed=seed % 2**31).detach()
    if empty:
        slots[0, 0, 0] = 0
    knobs = {"kind": kind, "negatives": negatives, "temperature": temperature}
    assert_same(step(slots, **knobs), step_of(reference_temporal_slot_contrast_loss, slots, **knobs), 1e-9)


def test_the_loss_of_constant_orthogonal_slots() -> None:
    # cosines are 1 and 0: -log(e^20 / (e^20 + 2)) = 4.1e-9, although float32 rounds the ratio to 1
    slots = torch.eye(3).repeat(1, 2, 1, 1).requires_grad_()
    loss = temporal_slot_contrast_loss(slots, temperature=0.05)
    assert math.isclose(loss.item(), math.log1p(2 * math.exp(-20)), rel_tol=1e-5)


def test_the_supervised_kind_scales_with_the_temperature() -> None:
    # one slot in four frames: frames 0 and 3 have a single positive, log 1 = 0; frames 1 and 2 have two equal
    # positives, log 2
    slots = torch.ones(1, 4, 1, 2)
    for temperature in (0.07, 0.14, 1.0):
        loss = temporal_slot_contrast_loss(slots, kind="supervised", temperature=temperature)
        assert math.isclose(loss.item(), math.log(2) / 2 * temperature / 0.07, rel_tol=1e-6)


# --- edge cases ---


def test_a_single_slot_has_no_loss() -> None:
    loss, gradient = step(sample(2, 3, 1, 5), negatives="video")
    assert loss == 0
    assert torch.equal(gradient, torch.zeros(2, 3, 1, 5))


# --- the contract of every loss ---


class TestAdjacent(LossContract):
    loss = TemporalSlotContrastLoss
    function = staticmethod(temporal_slot_contrast_loss)
    twice_differentiable = True
    settings: ClassVar = {"temperature": 0.2, "kind": "supervised", "negatives": "video"}
    not_applicable: ClassVar = {"poison": "every slot counts"}
    refused: ClassVar = [
        ({"temperature": 0.0}, ValueError, r"`temperature` must be finite and above 0.0; got 0.0"),
        ({"slots": torch.zeros(2, 0, 4, 5)}, ValueError, r"`slots` must have T >= 1; got T=0"),
        ({"slots": torch.zeros(2, 3, 0, 5)}, ValueError, r"`slots` must have S >= 1; got S=0"),
        ({"slots": torch.zeros(2, 3, 4, 0)}, ValueError, r"`slots` must have D >= 1; got D=0"),
    ]

    def case(self) -> Case:
        return Case(self.make(), {"slots": sample()}, {})

    def empty_cases(self, case: Case) -> dict[str, Case]:
        return {"one frame": case.mapped(lambda one: one[:, :1]), **super().empty_cases(case)}


class TestSupervised(TestAdjacent):
    knobs: ClassVar = {"kind": "supervised", "negatives": "video"}
    settings: ClassVar = {"temperature": 0.2, "kind": "adjacent", "negatives": "batch"}
