"""Masked tokens: published numbers, the slow definition, the center on the way, gradients, bad input."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from golden_neighbors import LOSS_TOL, Golden, deviation, golden_names
from ssync_loss.methods.ino.centered import CenteredCrossEntropy
from ssync_loss.methods.ino.masked_tokens import MaskedTokenLoss, masked_token_loss
from ssync_loss.methods.ino.reference import reference_masked_token_loss
from test_memory import Meter

NAN, INF = float("nan"), float("inf")
BITS = torch.ones(2, 3, 6, dtype=torch.bool)


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (B, T, N, Kp) of a student and of its teacher, and a mask that keeps some positions."""
    size = shape or (2, 3, 6, 5)
    generator = torch.Generator().manual_seed(seed)
    s, t = (torch.rand(size, generator=generator, dtype=torch.float64) * 2 - 1 for _ in range(2))
    mask = torch.rand(size[:3], generator=generator) < 0.6
    return s.to(dtype).requires_grad_(), t.to(dtype), mask


def centered(Kp: int = 5, seed: int = 1, **given: Any) -> CenteredCrossEntropy:
    """Return a criterion whose center is somewhere."""
    criterion = CenteredCrossEntropy(Kp, **given)
    criterion.center = torch.rand(Kp, generator=torch.Generator().manual_seed(seed)) - 0.5
    return criterion


def step(s: Tensor, t: Tensor, mask: Tensor, ce: CenteredCrossEntropy, **given: Any) -> tuple[Tensor, Tensor]:
    source = s.detach().requires_grad_()
    loss = masked_token_loss(source, t, mask, ce, **given)
    (gradient,) = torch.autograd.grad(loss, source)
    return loss.detach(), gradient


# --- values ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_published_numbers(dtype: torch.dtype) -> None:
    golden = Golden("ino_mim_T3")
    student = golden.tensor("student", dtype).requires_grad_()
    criterion = CenteredCrossEntropy(
        student.shape[3], tau_s=golden.number("tau_s"), tau_t=golden.number("tau_t"), m_c=golden.number("m_c")
    )
    loss = masked_token_loss(
        student, golden.tensor("teacher", dtype), golden.tensor("mask"), criterion, update_center=True
    )
    golden.assert_same_step(loss, student, "student")
    assert deviation(criterion.center, golden.tensor("center_after_f64")) <= LOSS_TOL[dtype]


def test_all_golden_files_are_here() -> None:
    assert golden_names("ino_mim") == ["ino_mim_T3"]


@settings(max_examples=60)
@given(
    shape=st.tuples(*(st.sampled_from(sizes) for sizes in ((0, 1, 3), (1, 2, 4), (0, 1, 3), (1, 4)))),
    seed=st.integers(0, 2**31),
    taus=st.sampled_from(((0.1, 0.04), (1.0, 2.0), (0.01, 0.003))),
    m_c=st.sampled_from((0.0, 0.9, 1.0)),
    update_center=st.booleans(),
    bare=st.booleans(),
)
def test_loss_gradient_and_center_are_those_of_the_slow_definition(
    shape: tuple[int, ...], seed: int, taus: tuple[float, float], m_c: float, update_center: bool, bare: bool
) -> None:
    s, t, mask = sample(*shape, dtype=torch.float64, seed=seed)
    if bare:
        # a frame in which nothing is masked: it is left out, and moves no center
        mask[:, 0] = False
    criterion = centered(shape[3], seed % 7, tau_s=taus[0], tau_t=taus[1], m_c=m_c)
    knobs: dict[str, Any] = {"tau_s": taus[0], "tau_t": taus[1], "m_c": m_c, "update_center": update_center}
    expected, center = reference_masked_token_loss(s, t, mask, criterion.center.clone(), **knobs)
    loss, gradient = step(s, t, mask, criterion, update_center=update_center)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, s)[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(criterion.center.double(), center.double(), rtol=1e-7, atol=1e-9)


def test_with_as_many_masked_positions_everywhere_it_is_the_mean_over_all() -> None:
    s, t, _ = sample(dtype=torch.float64)
    tube = torch.tensor([True, False, True, True, False, True])
    criterion = centered()
    loss, _ = step(s, t, tube.expand(2, 3, 6), criterion)
    torch.testing.assert_close(loss, criterion(s[:, :, tube], t[:, :, tube]).detach(), rtol=1e-12, atol=0)


def test_frames_count_alike_however_many_positions_they_mask() -> None:
    s, t, mask = sample(1, 2, 6, 5, dtype=torch.float64)
    mask[:, 0], mask[:, 1, 1:], mask[:, 1, 0] = True, False, True
    parts = [step(s[:, i : i + 1], t[:, i : i + 1], mask[:, i : i + 1], centered())[0] for i in range(2)]
    torch.testing.assert_close(step(s, t, mask, centered())[0], torch.stack(parts).mean(), rtol=1e-12, atol=0)


def test_a_grid_is_a_list_of_its_patches() -> None:
    s, t, mask = sample()
    grids = [one.detach().mT.unflatten(3, (2, 3)) for one in (s, t)]
    for update_center in (False, True):
        criterion, expected = centered(), centered()
        loss, gradient = step(grids[0], grids[1], mask.unflatten(2, (2, 3)), criterion, update_center=update_center)
        wanted = step(s, t, mask, expected, update_center=update_center)
        torch.testing.assert_close((loss, gradient.flatten(3).mT), wanted)
        torch.testing.assert_close(criterion.center, expected.center)


def test_unmasked_positions_may_hold_anything_and_get_no_gradient() -> None:
    s, t, mask = sample()
    criterion, expected = centered(), centered()
    wanted = step(s, t, mask, expected, update_center=True)
    assert not wanted[1][~mask].any()
    assert wanted[1][mask].all()
    s = s.detach().clone()
    s[~mask], t[~mask] = NAN, INF
    assert all(map(torch.equal, step(s, t, mask, criterion, update_center=True), wanted))
    assert torch.equal(criterion.center, expected.center)


# --- the center ---


def test_unasked_the_center_stays_and_an_explicit_call_moves_it_once() -> None:
    s, t, mask = sample()
    criterion, before = centered(), centered().center
    step(s, t, mask, criterion)
    assert torch.equal(criterion.center, before)
    criterion.update_center(t, mask=mask)
    torch.testing.assert_close(criterion.center, 0.9 * before + 0.1 * t[mask].mean(0))


def test_asked_it_moves_after_every_frame_that_masks_something() -> None:
    s, t, mask = sample()
    mask[:, 1] = False
    criterion, by_hand = centered(), centered()
    parts = []
    for i in (0, 2):
        now = slice(i, i + 1)
        parts.append(step(s[:, now], t[:, now], mask[:, now], by_hand)[0])
        by_hand.update_center(t[:, now], mask=mask[:, now])
    loss, _ = step(s, t, mask, criterion, update_center=True)
    torch.testing.assert_close(loss, torch.stack(parts).mean())
    torch.testing.assert_close(criterion.center, by_hand.center)
    assert not torch.isclose(loss, step(s, t, mask, centered())[0], rtol=1e-4)


def test_in_evaluation_it_stays_even_when_asked() -> None:
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


# --- empty, undefined, gradients, types ---


@pytest.mark.parametrize("shape", [(0, 3, 6, 5), (2, 3, 0, 5), (2, 1, 6, 5), (2, 3, 6, 5)])
@pytest.mark.parametrize("update_center", [False, True])
def test_nothing_masked_is_an_attached_zero_and_moves_nothing(shape: tuple[int, ...], update_center: bool) -> None:
    s, t, mask = sample(*shape)
    criterion, before = centered(), centered().center
    loss, gradient = step(s, t, torch.zeros_like(mask), criterion, update_center=update_center)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros(shape))
    assert torch.equal(criterion.center, before)


def test_a_single_frame_is_a_frame() -> None:
    s, t, mask = sample(2, 1, 6, 5)
    criterion = centered()
    torch.testing.assert_close(step(s, t, mask, criterion)[0], criterion(s[mask], t[mask]).detach())


@pytest.mark.parametrize("dirt", [NAN, INF])
@pytest.mark.parametrize("dirty", [0, 1])
def test_dirt_is_never_finite(dirty: int, dirt: float) -> None:
    pair = [one.detach().clone() for one in sample()[:2]]
    pair[dirty][0, 1, 2, 0] = dirt
    assert not step(pair[0], pair[1], BITS, centered())[0].isfinite()


@pytest.mark.parametrize("update_center", [False, True])
def test_gradcheck(update_center: bool) -> None:
    s, t, mask = sample(2, 2, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda one: masked_token_loss(one, t, mask, centered(3, tau_s=0.5), update_center=update_center), (s,)
    )


@pytest.mark.parametrize("update_center", [False, True])
def test_only_the_student_gets_a_gradient(update_center: bool) -> None:
    s, t, mask = sample()
    criterion = centered()
    masked_token_loss(s, t.requires_grad_(), mask, criterion, update_center=update_center).backward()
    assert t.grad is None
    assert not criterion.center.requires_grad
    assert s.grad is not None
    assert s.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_widened_and_their_gradient_is_of_their_type(dtype: torch.dtype) -> None:
    s, t, mask = sample(dtype=dtype)
    criterion, expected = centered(), centered()
    loss, gradient = step(s, t, mask, criterion, update_center=True)
    wide, wide_gradient = step(s.float(), t.float(), mask, expected, update_center=True)
    assert (loss.dtype, gradient.dtype, criterion.center.dtype) == (torch.float32, dtype, torch.float32)
    assert torch.equal(loss, wide)
    assert torch.equal(gradient, wide_gradient.to(dtype))
    assert torch.equal(criterion.center, expected.center)


def test_autocast_changes_nothing() -> None:
    case = sample()
    criterion, expected = centered(), centered()
    wanted = step(*case, expected, update_center=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = step(*case, criterion, update_center=True)
    assert all(map(torch.equal, actual, wanted))
    assert torch.equal(criterion.center, expected.center)


# --- graphs, work ---


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("update_center", [False, True])
def test_a_step_compiles_to_one_graph(update_center: bool) -> None:
    s, t, mask = sample()
    criterion, expected = centered(), centered()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(MaskedTokenLoss(criterion, update_center=update_center), fullgraph=True, backend=counter)
    for _ in range(2):
        loss = compiled(s, t, mask)
        wanted = step(s, t, mask, expected, update_center=update_center)
        torch.testing.assert_close((loss.detach(), torch.autograd.grad(loss, s)[0]), wanted)
        torch.testing.assert_close(criterion.center, expected.center)
    assert counter.frame_count == 1


def test_fake_tensors_carry_a_step() -> None:
    with FakeTensorMode():
        s = torch.randn(2, 3, 6, 5, requires_grad=True)
        mask = torch.ones(2, 3, 6, dtype=torch.bool)
        masked_token_loss(s, torch.randn(2, 3, 6, 5), mask, CenteredCrossEntropy(5), update_center=True).backward()
        assert s.grad is not None
        assert s.grad.shape == s.shape


def test_clips_and_frames_are_not_walked_through() -> None:
    numbers = set()
    for size in ((1, 2), (2, 3), (5, 9)):
        s, t, mask = sample(*size, 4, 5)
        with Meter() as meter:
            masked_token_loss(s, t, mask, centered(), update_center=True).backward()
        numbers.add(meter.num_operators)
    assert len(numbers) == 1


# --- the module, bad input ---


def test_a_module_remembers_its_settings() -> None:
    case = sample()
    module = MaskedTokenLoss(centered())
    assert torch.equal(module(*case), masked_token_loss(*case, centered()))
    assert list(module.state_dict()) == ["ce_patch.center"]
    module = MaskedTokenLoss(centered(), update_center=True)
    assert repr(module).startswith("MaskedTokenLoss(\n  update_center=True\n  (ce_patch): CenteredCrossEntropy(5)")
    moving = MaskedTokenLoss(centered(), update_center=True)
    expected = masked_token_loss(*case, centered(), update_center=True)
    for twin in (pickle.loads(pickle.dumps(moving)), copy.deepcopy(moving), moving):
        assert torch.equal(twin(*case), expected)


def test_a_criterion_of_another_kind_is_named() -> None:
    message = r"`ce_patch` must be a CenteredCrossEntropy; got CrossEntropyLoss"
    with pytest.raises(TypeError, match=message):
        masked_token_loss(*sample(), torch.nn.CrossEntropyLoss())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=message):
        MaskedTokenLoss(torch.nn.CrossEntropyLoss())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("s_pat", None, TypeError, r"`s_pat` must be a tensor; got NoneType"),
        ("s_pat", torch.zeros(6, 5), ValueError, r"`s_pat` must have shape \(B, T, Kp=5, H, W\); got \(6, 5\)"),
        ("s_pat", torch.zeros(2, 3, 6, 4), ValueError, r"`s_pat` must have shape \(B, T, N, Kp=5\); got"),
        ("s_pat", torch.zeros(2, 3, 6, 5).int(), TypeError, r"`s_pat` must be floating point; got"),
        ("s_pat", torch.zeros(2, 0, 6, 5), ValueError, r"`s_pat` must have T >= 1; got T=0"),
        ("t_pat", [1.0], TypeError, r"`t_pat` must be a tensor; got list"),
        ("t_pat", torch.zeros(2, 3, 7, 5), ValueError, r"`t_pat` must have shape \(B=2, T=3, N=6, Kp=5\); got"),
        ("t_pat", torch.zeros(2, 3, 6, 5).long(), TypeError, r"`t_pat` must be floating point; got torch.int64"),
        ("t_pat", torch.zeros(2, 3, 6, 5, device="meta"), ValueError, r"`t_pat` must be on the device of `s_pat`"),
        ("mask", None, TypeError, r"`mask` must be a tensor; got NoneType"),
        ("mask", BITS[:, :, :5], ValueError, r"`mask` must have shape \(B=2, T=3, N=6\); got \(2, 3, 5\)"),
        ("mask", BITS[0, 0], ValueError, r"`mask` must have shape \(B=2, T=3, N=6\); got \(6,\)"),
        ("mask", BITS.float(), TypeError, r"`mask` must be boolean; got torch.float32"),
        ("mask", BITS.to("meta"), ValueError, r"`mask` must be on the device of `s_pat`"),
    ],
)
def test_a_wrong_tensor_is_named(name: str, value: Any, error: type[Exception], message: str) -> None:
    s, t, mask = sample()
    with pytest.raises(error, match=message):
        masked_token_loss(**{"s_pat": s, "t_pat": t, "mask": mask, "ce_patch": centered(), name: value})


def test_a_center_on_another_device_is_named() -> None:
    with pytest.raises(ValueError, match=r"`s_pat` must be on the device of `center` \(meta\); got cpu"):
        masked_token_loss(*sample(), CenteredCrossEntropy(5).to("meta"))
