"""Masked tokens: published values, the reference, updates of the center, gradients, errors."""

from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contract import Case, LossContract
from golden_neighbors import LOSS_TOL, Golden, deviation
from meter import Meter
from ssync_loss import CenteredCrossEntropy, MaskedTokenLoss
from ssync_loss.functional import masked_token_loss
from ssync_loss.methods.ino.reference import reference_masked_token_loss
from steps import step_of

BITS = torch.ones(2, 3, 6, dtype=torch.bool)


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (B, T, N, Kp) of a student and its teacher, and a mask of some positions."""
    size = shape or (2, 3, 6, 5)
    generator = torch.Generator().manual_seed(seed)
    s, t = (torch.rand(size, generator=generator, dtype=torch.float64) * 2 - 1 for _ in range(2))
    mask = torch.rand(size[:3], generator=generator) < 0.6
    return s.to(dtype).requires_grad_(), t.to(dtype), mask


def centered(Kp: int = 5, seed: int = 1, **given: Any) -> CenteredCrossEntropy:
    """Return a criterion with a random center."""
    criterion = CenteredCrossEntropy(Kp, **given)
    criterion.center = torch.rand(Kp, generator=torch.Generator().manual_seed(seed)) - 0.5
    return criterion


def step(s: Tensor, *others: Any, **given: Any) -> tuple[Tensor, Tensor]:
    return step_of(masked_token_loss, s, *others, **given)


# --- values ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_published_numbers(dtype: torch.dtype) -> None:
    golden = Golden("ino_mim_T3")
    student = golden.tensor("student", dtype).requires_grad_()
    criterion = CenteredCrossEntropy(student.shape[3], **golden.numbers("tau_s", "tau_t", "m_c"))
    loss = masked_token_loss(
        student, golden.tensor("teacher", dtype), golden.tensor("mask"), criterion, update_center=True
    )
    golden.assert_same_step(loss, student, "student")
    assert deviation(criterion.center, golden.tensor("center_after_f64")) <= LOSS_TOL[dtype]


@settings(max_examples=60)
@given(
    shape=st.tuples(*(st.sampled_from(sizes) for sizes in ((0, 1, 3), (1, 2, 4), (0, 1, 3), (1, 4)))),
    seed=st.integers(0, 2**31),
    taus=st.sampled_from(((0.1, 0.04), (1.0, 2.0), (0.01, 0.003))),
    m_c=st.sampled_from((0.0, 0.9, 1.0)),
    update_center=st.booleans(),
    bare=st.booleans(),
)
def test_loss_gradient_and_center_equal_the_reference(
    shape: tuple[int, ...], seed: int, taus: tuple[float, float], m_c: float, update_center: bool, bare: bool
) -> None:
    s, t, mask = sample(*shape, dtype=torch.float64, seed=seed)
    if bare:
        # a frame without masked positions does not count and does not update the center
        mask[:, 0] = False
    criterion = centered(shape[3], seed % 7, tau_s=taus[0], tau_t=taus[1], m_c=m_c)
    knobs: dict[str, Any] = {"tau_s": taus[0], "tau_t": taus[1], "m_c": m_c, "update_center": update_center}
    expected, center = reference_masked_token_loss(s, t, mask, criterion.center.clone(), **knobs)
    loss, gradient = step(s, t, mask, criterion, update_center=update_center)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, s)[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(criterion.center.double(), center.double(), rtol=1e-7, atol=1e-9)


def test_a_grid_equals_the_list_of_its_patches() -> None:
    s, t, mask = sample()
    grids = [one.detach().mT.unflatten(3, (2, 3)) for one in (s, t)]
    for update_center in (False, True):
        criterion, expected = centered(), centered()
        loss, gradient = step(grids[0], grids[1], mask.unflatten(2, (2, 3)), criterion, update_center=update_center)
        wanted = step(s, t, mask, expected, update_center=update_center)
        torch.testing.assert_close((loss, gradient.flatten(3).mT), wanted)
        torch.testing.assert_close(criterion.center, expected.center)


# --- the center ---


def test_the_center_stays_in_evaluation() -> None:
    s, t, mask = sample()
    criterion = centered().eval()
    before = criterion.center.clone()
    assert torch.equal(step(s, t, mask, criterion, update_center=True)[0], step(s, t, mask, criterion)[0])
    assert torch.equal(criterion.center, before)
    module = MaskedTokenLoss(criterion, update_center=True).eval()
    module(s, t, mask)
    assert torch.equal(criterion.center, before)
    module.train()(s, t, mask)
    assert not torch.equal(criterion.center, before)


def test_there_is_no_loop_over_clips_and_frames() -> None:
    numbers = set()
    for size in ((1, 2), (2, 3), (5, 9)):
        s, t, mask = sample(*size, 4, 5)
        with Meter() as meter:
            masked_token_loss(s, t, mask, centered(), update_center=True).backward()
        numbers.add(meter.num_operators)
    assert len(numbers) == 1


def test_a_center_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`s_pat` must be on the device of `center` \(meta\); got cpu"):
        masked_token_loss(*sample(), CenteredCrossEntropy(5).to("meta"))


# --- the contract of every loss ---


class TestContract(LossContract):
    loss = MaskedTokenLoss
    function = staticmethod(masked_token_loss)
    twice_differentiable = True
    settings: ClassVar = {"update_center": True}
    state: ClassVar = ["ce_patch.center"]
    refused: ClassVar = [
        ({"ce_patch": torch.nn.CrossEntropyLoss()}, TypeError, r"`ce_patch` must be a CenteredCrossEntropy; got Cross"),
        ({"s_pat": torch.zeros(6, 5)}, ValueError, r"`s_pat` must have shape \(B, T, Kp=5, H, W\); got \(6, 5\)"),
        ({"s_pat": torch.zeros(2, 3, 6, 4)}, ValueError, r"`s_pat` must have shape \(B, T, N, Kp=5\); got"),
        ({"s_pat": torch.zeros(2, 0, 6, 5)}, ValueError, r"`s_pat` must have T >= 1; got T=0"),
        ({"t_pat": torch.zeros(2, 3, 7, 5)}, ValueError, r"`t_pat` must have shape \(B=2, T=3, N=6, Kp=5\); got"),
        ({"mask": BITS[:, :, :5]}, ValueError, r"`mask` must have shape \(B=2, T=3, N=6\); got \(2, 3, 5\)"),
        ({"mask": BITS[0, 0]}, ValueError, r"`mask` must have shape \(B=2, T=3, N=6\); got \(6,\)"),
    ]

    def make(self, **settings: Any) -> MaskedTokenLoss:
        return MaskedTokenLoss(**{"ce_patch": centered(), **self.knobs, **settings})

    def case(self) -> Case:
        s, t, mask = sample()
        return Case(self.make(), {"s_pat": s}, {"t_pat": t, "mask": mask})

    def empty_cases(self, case: Case) -> dict[str, Case]:
        nothing = case.replaced(mask=case.others["mask"] & False)
        return {
            "nothing masked": nothing,
            "nothing masked in a frame": nothing.mapped(lambda one: one[:, :1]),
            "no positions": case.mapped(lambda one: one[:, :, :0]),
            **super().empty_cases(case),
        }

    def unselected(self, case: Case) -> dict[str, Tensor]:
        seen = ~case.others["mask"].unsqueeze(3)
        return {"s_pat": seen, "t_pat": seen}


class TestMovingCenter(TestContract):
    """The contract in the published order, in which every frame updates the center."""

    knobs: ClassVar = {"update_center": True}
    settings: ClassVar = {"update_center": False}

    def test_checkpoint(self) -> None:
        with pytest.raises(RuntimeError, match=r"^`center` would move twice, as a checkpoint computes this"):
            super().test_checkpoint()
