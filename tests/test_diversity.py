"""Mask diversity: published values, the reference, its extremes, gradients, errors."""

import math
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contract import INF, Case, LossContract
from golden_neighbors import GRADIENT_TOL, LOSS_TOL, Golden, deviation, golden_names
from ssync_loss import MaskDiversityLoss
from ssync_loss.functional import mask_diversity_loss
from ssync_loss.methods.smtc.reference import reference_mask_diversity_loss
from steps import assert_same, step_of

# float32 cannot represent the directions of masks of about 1e-13 + 1e-8; the published code has an error of 2e-4
COLLAPSED_TOL = {torch.float32: 2e-3, torch.float64: 1e-9}


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return maps of the shape (B, T, S, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape or (2, 3, 4, 2, 3), generator=generator, dtype=torch.float64)).to(dtype)


def step(logits: Tensor, loss_of: Any = mask_diversity_loss) -> tuple[Tensor, Tensor]:
    return step_of(loss_of, logits)


# --- values ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", golden_names("mask_diversity_", 2))
def test_published_numbers(name: str, dtype: torch.dtype) -> None:
    golden = Golden(name)
    loss, gradient = step(golden.tensor("Z", dtype))
    tol = COLLAPSED_TOL if name.endswith("collapsed") else GRADIENT_TOL
    assert deviation(loss, golden.tensor("loss_f64")) <= LOSS_TOL[dtype]
    assert deviation(gradient, golden.tensor("grad_Z_f64")) <= tol[dtype]


DRAWN = {
    "shape": st.tuples(*(st.sampled_from(sizes) for sizes in ((1, 2), (1, 3), (1, 2, 5), (1, 2), (1, 3)))),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=60)
@given(**DRAWN)
def test_value_and_gradient_equal_the_reference(shape: tuple[int, ...], seed: int) -> None:
    logits = sample(*shape, dtype=torch.float64, seed=seed)
    assert_same(step(logits), step(logits, reference_mask_diversity_loss), 1e-12)


def test_the_loss_of_uniform_masks_is_one() -> None:
    assert math.isclose(mask_diversity_loss(torch.zeros(2, 3, 5, 2, 2)).item(), 1.0, rel_tol=1e-6)


def test_the_loss_is_one_if_a_slot_has_every_patch() -> None:
    logits = torch.zeros(1, 1, 4, 3, 3)
    logits[:, :, 0] = 60
    # the other masks are constant, like the full mask, so all six pairs have cosine 1
    assert math.isclose(mask_diversity_loss(logits).item(), 1.0, rel_tol=1e-6)


def test_the_loss_of_disjoint_masks_is_zero() -> None:
    logits = 60 * torch.eye(4).view(1, 1, 4, 2, 2)
    assert mask_diversity_loss(logits) < 1e-7


def test_a_slot_may_be_minus_infinity() -> None:
    logits = sample()
    logits[:, :, 1:3] = -INF
    loss, gradient = step(logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()


# --- the contract of every loss ---


class TestContract(LossContract):
    loss = MaskDiversityLoss
    function = staticmethod(mask_diversity_loss)
    twice_differentiable = True
    not_applicable: ClassVar = {"poison": "every patch of every slot counts"}
    refused: ClassVar = [
        ({"logits": torch.zeros(2, 0, 4, 2, 3)}, ValueError, r"`logits` must have T >= 1; got T=0"),
        ({"logits": torch.zeros(2, 3, 0, 2, 3)}, ValueError, r"`logits` must have S >= 1; got S=0"),
        ({"logits": torch.zeros(2, 3, 4, 2, 0)}, ValueError, r"`logits` must have W >= 1; got W=0"),
    ]

    def case(self) -> Case:
        return Case(self.make(), {"logits": sample(2, 2, 3, 2, 2)}, {})

    def empty_cases(self, case: Case) -> dict[str, Case]:
        single = case.replaced(logits=case.inputs["logits"][:, :, :1])
        return {"one slot": single, **super().empty_cases(case)}
