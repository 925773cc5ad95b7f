"""Slot redundancy: published values and picks, the reference, gradients, errors."""

import math
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contract import NAN, Case, LossContract
from golden_neighbors import Golden, golden_names
from ssync_loss import SlotRedundancyLoss
from ssync_loss.functional import slot_redundancy_loss
from ssync_loss.methods.srl.redundancy import redundant_slots
from ssync_loss.methods.srl.reference import reference_slot_redundancy_loss
from steps import assert_same, step_of


def sample(*shape: int, dtype: torch.dtype = torch.float32, channels: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return attention (B, T, S, N), which is a softmax over N, and slots (B, T, S, D)."""
    size = shape or (2, 3, 5, 8)
    generator = torch.Generator().manual_seed(seed)
    attention = (2 * torch.randn(size, generator=generator, dtype=torch.float64)).softmax(3)
    slots = torch.randn(*size[:3], channels, generator=generator, dtype=torch.float64)
    return attention.to(dtype).requires_grad_(), slots.to(dtype)


def step(attention: Tensor, slots: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    return step_of(slot_redundancy_loss, attention, slots, **given)


def divergence(attention: Tensor) -> Tensor:
    return (attention * (attention + 1e-8).log()).sum(3).mean(1) + math.log(attention.shape[3])


# --- values ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", golden_names("slot_redundancy_", 2))
def test_published_numbers(name: str, dtype: torch.dtype) -> None:
    golden = Golden(name)
    knobs = {"num_picked": golden.count("k")}
    slots = golden.tensor("slots", dtype).requires_grad_()
    logits = golden.tensor("attention_logits", dtype).requires_grad_()
    loss = slot_redundancy_loss(logits.softmax(3), slots, **knobs)
    golden.assert_same_step(loss, logits, "attention_logits")
    attention = golden.tensor("attention", dtype).requires_grad_()
    loss = slot_redundancy_loss(attention, slots, **knobs)
    golden.assert_same_step(loss, attention, "attention", loss_name="loss_from_attention")
    picks = redundant_slots(divergence(attention), slots[:, -1], **knobs)
    expected = golden.tensor("picks").long()
    missing = expected.shape[1] - picks.shape[1]
    assert torch.equal(torch.nn.functional.pad(picks, (0, missing), value=-1), expected)


@settings(max_examples=60)
@given(
    shape=st.tuples(*(st.sampled_from(sizes) for sizes in ((1, 3), (1, 2), (1, 2, 3, 6), (1, 5)))),
    num_picked=st.integers(1, 7),
    seed=st.integers(0, 2**31),
    twins=st.booleans(),
)
def test_value_and_gradient_equal_the_reference(
    shape: tuple[int, ...], num_picked: int, seed: int, twins: bool
) -> None:
    attention, slots = sample(*shape, dtype=torch.float64, seed=seed)
    if twins:
        # equal slots with equal attention
        attention = attention.detach().clone()
        attention[:, :, -1], slots[:, :, -1] = attention[:, :, 0], slots[:, :, 0]
    expected = step_of(reference_slot_redundancy_loss, attention, slots, num_picked=num_picked)
    assert_same(step(attention, slots, num_picked=num_picked), expected, 1e-12)


def test_the_more_uniform_slot_of_the_most_similar_pair_is_picked() -> None:
    slots = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.2]]])
    far, near = torch.tensor([[9.0, 2.0, 3.0, 0.0]]), torch.tensor([[9.0, 3.0, 2.0, 0.0]])
    assert redundant_slots(far, slots, num_picked=1).tolist() == [[1]]
    assert redundant_slots(near, slots, num_picked=1).tolist() == [[2]]
    # the next picks are 2 of the pair (0, 2) and 3 of the pair (0, 3); slot 0 remains
    assert redundant_slots(far, slots, num_picked=9).tolist() == [[1, 2, 3]]


def test_ties_pick_the_lower_index() -> None:
    slots = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    assert redundant_slots(torch.ones(1, 3), slots, num_picked=2).tolist() == [[1, 0]]
    # all pairs are equally similar, so the first pair comes first
    assert redundant_slots(torch.ones(1, 3), torch.ones(1, 3, 2), num_picked=2).tolist() == [[0, 1]]


def test_attention_of_zero_is_finite() -> None:
    _, slots = sample()
    attention = torch.zeros(2, 3, 5, 8)
    attention[..., 0] = 1
    loss, gradient = step(attention, slots)
    assert math.isclose(loss.item(), math.log(8), rel_tol=1e-6)
    assert gradient.isfinite().all()


def test_maps_may_have_a_grid() -> None:
    attention, slots = sample()
    grid = attention.detach().view(2, 3, 5, 2, 4)
    loss, gradient = step(grid, slots)
    assert_same((loss, gradient.flatten(3)), step(attention, slots), 0.0)


def test_attention_of_nan_gives_nan() -> None:
    attention, slots = sample()
    attention = attention.detach().clone()
    attention[0, -1, 0, 0] = NAN
    assert step(attention, slots)[0].isnan()


# --- the contract of every loss ---


class TestContract(LossContract):
    loss = SlotRedundancyLoss
    function = staticmethod(slot_redundancy_loss)
    twice_differentiable = True
    settings: ClassVar = {"num_picked": 2}
    narrow: ClassVar = {"slots": "they only select the attention that counts"}
    hides_dirt: ClassVar = {**narrow, "attention": "the attention of other slots does not count"}
    not_applicable: ClassVar = {"poison": "every slot of every frame counts"}
    refused: ClassVar = [
        ({"num_picked": 0}, ValueError, r"`num_picked` must be at least 1; got 0"),
        ({"attention": torch.zeros(2, 0, 5, 8)}, ValueError, r"`attention` must have T >= 1; got T=0"),
        ({"attention": torch.zeros(2, 3, 0, 8)}, ValueError, r"`attention` must have S >= 1; got S=0"),
        ({"attention": torch.zeros(2, 3, 5, 0)}, ValueError, r"`attention` must have N >= 1; got N=0"),
        ({"slots": torch.zeros(2, 3, 4, 6)}, ValueError, r"`slots` must have shape \(B=2, T=3, S=5, D\); got"),
        ({"slots": torch.zeros(2, 3, 5, 0)}, ValueError, r"`slots` must have D >= 1; got D=0"),
    ]

    def case(self) -> Case:
        attention, slots = sample()
        # numerical second derivatives are inexact at nearly empty patches
        attention = attention.sqrt()
        return Case(self.make(), {"attention": attention}, {"slots": slots})

    def empty_cases(self, case: Case) -> dict[str, Case]:
        return {"one slot": case.mapped(lambda one: one[:, :, :1]), **super().empty_cases(case)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dirt", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("frame", [0, -1])
def test_nonfinite_slots_make_the_loss_and_its_gradient_nan(frame: int, dirt: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    attention = torch.randn(2, 3, 4, 5).softmax(3).requires_grad_()
    slots = torch.randn(2, 3, 4, 6).to(dtype)
    slots[1, frame, 2, 3] = dirt
    loss = slot_redundancy_loss(attention, slots)
    loss.backward()
    assert loss.isnan()
    assert attention.grad is not None
    assert attention.grad.isnan().any()
