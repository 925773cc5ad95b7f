"""Out-generative learning: published values, the reference, pairs, balance, the center, errors."""

from collections.abc import Iterable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contract import Case, LossContract
from golden_neighbors import GRADIENT_TOL, LOSS_TOL, Golden, deviation
from meter import Meter
from ssync_loss import CenteredCrossEntropy, OutGenerativeLoss
from ssync_loss.functional import out_generative_loss
from ssync_loss.methods.ino.reference import reference_out_generative_loss

Views = tuple[Tensor, Tensor, Tensor]


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Views:
    """Return global and local views of the student, and global views of the teacher, for (B, T, g, l, Kp)."""
    clips, frames, num_global, num_local, Kp = shape or (2, 4, 1, 3, 5)
    generator = torch.Generator().manual_seed(seed)
    s_glob, s_loc, t_glob = (
        (torch.rand(clips, frames, views, Kp, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype)
        for views in (num_global, num_local, num_global)
    )
    return s_glob.requires_grad_(), s_loc.requires_grad_(), t_glob


def centered(Kp: int = 5, seed: int = 1, **given: Any) -> CenteredCrossEntropy:
    """Return a criterion with a random center."""
    criterion = CenteredCrossEntropy(Kp, **given)
    criterion.center = torch.rand(Kp, generator=torch.Generator().manual_seed(seed)) - 0.5
    return criterion


def step(views: Iterable[Tensor], ce: CenteredCrossEntropy, **given: Any) -> Views:
    s_glob, s_loc, t_glob = (one.detach() for one in views)
    loss = out_generative_loss(s_glob.requires_grad_(), s_loc.requires_grad_(), t_glob, ce, **given)
    of_global, of_local = torch.autograd.grad(loss, (s_glob, s_loc))
    return loss.detach(), of_global, of_local


# --- values ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_published_numbers(dtype: torch.dtype) -> None:
    golden = Golden("ino_out_generative_T4_l3")
    views = [golden.tensor(name, dtype) for name in ("s_glob", "s_loc", "t_glob")]
    criterion = CenteredCrossEntropy(views[0].shape[3], **golden.numbers("tau_s", "tau_t", "m_c"))
    loss, of_global, of_local = step(views, criterion, update_center=True)
    assert loss.dtype == dtype
    assert deviation(loss, golden.tensor("loss_f64")) <= LOSS_TOL[dtype]
    assert deviation(of_global, golden.tensor("grad_s_glob_f64")) <= GRADIENT_TOL[dtype]
    assert deviation(of_local, golden.tensor("grad_s_loc_f64")) <= GRADIENT_TOL[dtype]
    assert deviation(criterion.center, golden.tensor("center_after_f64")) <= LOSS_TOL[dtype]


@settings(max_examples=50)
@given(
    shape=st.tuples(*(st.sampled_from(sizes) for sizes in ((0, 1, 2), (1, 2, 4), (1, 2), (0, 1, 2), (1, 3)))),
    seed=st.integers(0, 2**31),
    taus=st.sampled_from(((0.1, 0.04), (1.0, 2.0), (0.01, 0.003))),
    m_c=st.sampled_from((0.0, 0.9)),
    balance=st.sampled_from(("flat", "per_term")),
    update_center=st.booleans(),
)
def test_loss_gradients_and_center_equal_the_reference(
    shape: tuple[int, ...], seed: int, taus: tuple[float, float], m_c: float, balance: Any, update_center: bool
) -> None:
    views = sample(*shape, dtype=torch.float64, seed=seed)
    criterion = centered(shape[4], seed % 7, tau_s=taus[0], tau_t=taus[1], m_c=m_c)
    knobs: dict[str, Any] = {"tau_s": taus[0], "tau_t": taus[1], "m_c": m_c}
    knobs |= {"balance": balance, "update_center": update_center}
    expected, center = reference_out_generative_loss(*views, criterion.center.clone(), **knobs)
    gradients = torch.autograd.grad(expected, views[:2], materialize_grads=True)
    actual = step(views, criterion, balance=balance, update_center=update_center)
    for one, other in zip(actual, (expected.detach(), *gradients), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(criterion.center.double(), center.double(), rtol=1e-7, atol=1e-9)


def test_one_global_and_eight_local_crops_have_34_terms() -> None:
    # distributions are one-hot: a match has value 0, a mismatch 1 / tau_s = 10
    views = torch.eye(2)[:, None].expand(1, 2, 1, 2)
    wrong, right = views.flip(1), views
    local = torch.tensor([1.0, 0.0]).expand(1, 2, 8, 2)
    criterion = CenteredCrossEntropy(2, tau_t=1e-3)
    # global crops predict the prototype of the other frame, which differs; 2 of 34 terms are global
    nothing_global = out_generative_loss(wrong, local, views, criterion)
    all_global = out_generative_loss(right, local, views, criterion)
    assert (all_global - nothing_global).item() == pytest.approx(10 * 2 / 34, rel=1e-4)
    # half of the local terms are wrong
    assert nothing_global.item() == pytest.approx(10 * 16 / 34, rel=1e-3)
    nothing_global, all_global = (
        out_generative_loss(one, local, views, criterion, balance="per_term") for one in (wrong, right)
    )
    assert (all_global - nothing_global).item() == pytest.approx(10 / 2, rel=1e-4)


# --- the center ---


def test_the_center_stays_in_evaluation() -> None:
    views = sample()
    criterion, before = centered().eval(), centered().center
    assert torch.equal(step(views, criterion, update_center=True)[0], step(views, criterion)[0])
    assert torch.equal(criterion.center, before)


# --- work ---


def test_there_is_no_loop_over_clips_and_views() -> None:
    numbers = set()
    for shape in ((2, 4, 2, 3, 5), (3, 6, 2, 2, 5), (5, 8, 3, 8, 5)):
        views = sample(*shape)
        with Meter() as meter:
            out_generative_loss(*views, centered(), update_center=True).backward()
        numbers.add(meter.num_operators)
    assert len(numbers) == 1


def test_pairs_of_views_do_not_copy_distributions() -> None:
    # the distributions of 34 terms per pair would have 34 x 2 x 1000 values
    views = sample(1, 4, 1, 8, 1000)
    with Meter(views) as meter:
        out_generative_loss(*views, centered(1000)).backward()
    rows = 4 * (1 + 8 + 1)
    assert meter.peak < 4 * 4 * rows * 1000


# --- errors ---


@pytest.mark.parametrize("num_frames", [3, 5])
def test_an_odd_number_of_frames_is_refused(num_frames: int) -> None:
    message = rf"`s_glob` must have an even T, for the pairs of frames \(i, i \+ T / 2\); got T={num_frames}"
    with pytest.raises(ValueError, match=message):
        out_generative_loss(*sample(2, num_frames, 1, 3, 5), centered())


# --- the contract of every loss ---


class TestContract(LossContract):
    loss = OutGenerativeLoss
    function = staticmethod(out_generative_loss)
    twice_differentiable = True
    settings: ClassVar = {"balance": "per_term", "update_center": True}
    state: ClassVar = ["ce.center"]
    not_applicable: ClassVar = {"poison": "every view counts"}
    refused: ClassVar = [
        ({"ce": torch.nn.CrossEntropyLoss()}, TypeError, r"`ce` must be a CenteredCrossEntropy; got CrossEntropyLoss"),
        ({"s_glob": torch.zeros(2, 4, 1, 6)}, ValueError, r"`s_glob` must have shape \(B, T, g, Kp=5\); got"),
        ({"s_glob": torch.zeros(2, 4, 0, 5)}, ValueError, r"`s_glob` must have g >= 1; got g=0"),
        ({"s_glob": torch.zeros(2, 0, 1, 5)}, ValueError, r"`s_glob` must have T >= 1; got T=0"),
        ({"s_loc": torch.zeros(2, 3, 3, 5)}, ValueError, r"`s_loc` must have shape \(B=2, T=4, l, Kp=5\); got"),
        ({"t_glob": torch.zeros(2, 4, 2, 5)}, ValueError, r"`t_glob` must have shape \(B=2, T=4, g=1, Kp=5\); got"),
    ]

    def make(self, **settings: Any) -> OutGenerativeLoss:
        return OutGenerativeLoss(**{"ce": centered(), **self.knobs, **settings})

    def case(self) -> Case:
        s_glob, s_loc, t_glob = sample()
        return Case(self.make(), {"s_glob": s_glob, "s_loc": s_loc}, {"t_glob": t_glob})

    def empty_cases(self, case: Case) -> dict[str, Case]:
        no_crops = case.replaced(s_loc=case.inputs["s_loc"][:, :, :0])
        return {
            "one frame": case.mapped(lambda one: one[:, :1]),
            "one frame, no crops": no_crops.mapped(lambda one: one[:, :1]),
            "no clips, no crops": no_crops.clips(),
            **super().empty_cases(case),
        }


class TestMovingCenter(TestContract):
    """The contract in the published order, in which every pair of frames updates the center."""

    knobs: ClassVar = {"balance": "per_term", "update_center": True}
    settings: ClassVar = {"balance": "flat", "update_center": False}

    def test_checkpoint(self) -> None:
        with pytest.raises(RuntimeError, match=r"^`center` would move twice, as a checkpoint computes this"):
            super().test_checkpoint()
