"""Slot redundancy: published numbers and picks, the slow definition, gradients, bad input."""

import copy
import math
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

from golden_neighbors import Golden, golden_names
from ssync_loss import SlotRedundancyLoss
from ssync_loss.functional import slot_redundancy_loss
from ssync_loss.methods.srl.redundancy import EPSILON, redundant_slots
from ssync_loss.methods.srl.reference import reference_slot_redundancy_loss


def sample(*shape: int, dtype: torch.dtype = torch.float32, channels: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return attention (B, T, S, N), a softmax over N, and slots (B, T, S, D)."""
    size = shape or (2, 3, 5, 8)
    generator = torch.Generator().manual_seed(seed)
    attention = (2 * torch.randn(size, generator=generator, dtype=torch.float64)).softmax(3)
    slots = torch.randn(*size[:3], channels, generator=generator, dtype=torch.float64)
    return attention.to(dtype).requires_grad_(), slots.to(dtype)


def step(attention: Tensor, slots: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    return step_of(slot_redundancy_loss, attention, slots, **given)


def step_of(loss_of: Any, attention: Tensor, slots: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    source = attention.detach().requires_grad_()
    loss = loss_of(source, slots, **given)
    (gradient,) = torch.autograd.grad(loss, source)
    return loss.detach(), gradient


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tol: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tol, atol=tol)


def divergence(attention: Tensor) -> Tensor:
    return (attention * (attention + 1e-8).log()).sum(3).mean(1) + math.log(attention.shape[3])


# --- values ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", golden_names("slot_redundancy_"))
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
    assert golden.number("eps_in_log") == EPSILON


def test_all_golden_files_are_here() -> None:
    assert len(golden_names("slot_redundancy_")) == 2


@settings(max_examples=60)
@given(
    shape=st.tuples(*(st.sampled_from(sizes) for sizes in ((1, 3), (1, 2), (1, 2, 3, 6), (1, 5)))),
    num_picked=st.integers(1, 7),
    seed=st.integers(0, 2**31),
    twins=st.booleans(),
)
def test_value_and_gradient_are_those_of_the_slow_definition(
    shape: tuple[int, ...], num_picked: int, seed: int, twins: bool
) -> None:
    attention, slots = sample(*shape, dtype=torch.float64, seed=seed)
    if twins:
        # as similar as can be, and equally far from uniform
        attention = attention.detach().clone()
        attention[:, :, -1], slots[:, :, -1] = attention[:, :, 0], slots[:, :, 0]
    expected = step_of(reference_slot_redundancy_loss, attention, slots, num_picked=num_picked)
    assert_same(step(attention, slots, num_picked=num_picked), expected, 1e-12)


def test_the_less_decided_slot_of_the_most_similar_pair_is_picked() -> None:
    slots = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.2]]])
    far, near = torch.tensor([[9.0, 2.0, 3.0, 0.0]]), torch.tensor([[9.0, 3.0, 2.0, 0.0]])
    assert redundant_slots(far, slots, num_picked=1).tolist() == [[1]]
    assert redundant_slots(near, slots, num_picked=1).tolist() == [[2]]
    # then of 0 and 2 the latter, and of 0 and 3 the latter; 0 has no partner left
    assert redundant_slots(far, slots, num_picked=9).tolist() == [[1, 2, 3]]


def test_of_slots_equally_far_from_uniform_the_lower_index_is_picked() -> None:
    slots = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    assert redundant_slots(torch.ones(1, 3), slots, num_picked=2).tolist() == [[1, 0]]
    # all pairs equally similar: the first pair comes first
    assert redundant_slots(torch.ones(1, 3), torch.ones(1, 3, 2), num_picked=2).tolist() == [[0, 1]]


def test_the_last_frame_decides_and_all_frames_are_pushed() -> None:
    attention, slots = sample(1, 3, 4, 8)
    loss, gradient = step(attention, slots, num_picked=1)
    earlier = slots.clone()
    earlier[:, :-1] = earlier[:, :-1].flip(2)
    assert torch.equal(step(attention, earlier, num_picked=1)[0], loss)
    pushed = gradient.abs().sum(3) > 0
    assert pushed.sum() == 3
    assert pushed[0].all(0).sum() == 1


def test_uniform_attention_costs_nothing() -> None:
    _, slots = sample()
    attention = torch.full((2, 3, 5, 8), 1 / 8)
    assert slot_redundancy_loss(attention, slots).abs() < 1e-6


def test_attention_of_zero_is_finite() -> None:
    _, slots = sample()
    attention = torch.zeros(2, 3, 5, 8)
    attention[..., 0] = 1
    loss, gradient = step(attention, slots)
    assert math.isclose(loss.item(), math.log(8), rel_tol=1e-6)
    assert gradient.isfinite().all()


def test_maps_may_keep_their_grid() -> None:
    attention, slots = sample()
    grid = attention.detach().view(2, 3, 5, 2, 4)
    loss, gradient = step(grid, slots)
    assert_same((loss, gradient.flatten(3)), step(attention, slots), 0.0)


@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 3, 1, 8)])
def test_nothing_to_pick_is_an_attached_zero(shape: tuple[int, ...]) -> None:
    loss, gradient = step(*sample(*shape))
    assert loss == 0
    assert torch.equal(gradient, torch.zeros(shape))


@pytest.mark.parametrize("dirty", [0, 1])
def test_dirt_raises_nothing(dirty: int) -> None:
    data = [one.detach().clone() for one in sample()]
    data[dirty][0, -1, 0, 0] = float("nan")
    loss, _ = step(data[0], data[1])
    assert loss.isnan()


# --- gradients, types, graphs ---


def test_gradcheck() -> None:
    attention, slots = sample(2, 2, 4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda one: slot_redundancy_loss(one, slots, num_picked=2), (attention,))


def test_slots_get_no_gradient() -> None:
    attention, slots = sample()
    slot_redundancy_loss(attention, slots.requires_grad_()).backward()
    assert slots.grad is None
    assert attention.grad is not None
    assert attention.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_widened_and_their_gradient_is_of_their_type(dtype: torch.dtype) -> None:
    attention, slots = sample(dtype=dtype)
    loss, gradient = step(attention, slots)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    wide, wide_gradient = step(attention.float(), slots.float())
    assert torch.equal(loss, wide)
    assert torch.equal(gradient, wide_gradient.to(dtype))


def test_autocast_changes_nothing() -> None:
    data = sample()
    expected = step(*data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = step(*data)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_strides_mean_nothing() -> None:
    attention, slots = sample()
    views = (attention.detach().mT.contiguous().mT, slots.transpose(0, 2).contiguous().transpose(0, 2))
    assert not any(one.is_contiguous() for one in views)
    assert_same(step(*views), step(attention, slots), 1e-6)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_step_compiles_to_one_graph() -> None:
    attention, slots = sample()
    counter = CompileCounterWithBackend("aot_eager")
    loss = torch.compile(SlotRedundancyLoss(), fullgraph=True, backend=counter)(attention, slots)
    (gradient,) = torch.autograd.grad(loss, attention)
    assert counter.frame_count == 1
    assert_same((loss.detach(), gradient), step(attention, slots), 1e-6)


def test_fake_tensors_carry_a_step() -> None:
    with FakeTensorMode():
        attention = torch.randn(2, 3, 5, 8, requires_grad=True)
        slot_redundancy_loss(attention, torch.randn(2, 3, 5, 6)).backward()
        assert attention.grad is not None
        assert attention.grad.shape == attention.shape


# --- the module, bad input ---


def test_a_module_remembers_its_setting() -> None:
    data = sample()
    assert torch.equal(SlotRedundancyLoss()(*data), slot_redundancy_loss(*data, num_picked=5))
    criterion = SlotRedundancyLoss(num_picked=2)
    assert repr(criterion) == "SlotRedundancyLoss(num_picked=2)"
    assert not criterion.state_dict()
    for twin in (criterion, pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion)):
        assert torch.equal(twin(*data), slot_redundancy_loss(*data, num_picked=2))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [(0, ValueError, r"`num_picked` must be at least 1; got 0"), (2.0, TypeError, r"`num_picked` must be an integer")],
)
def test_a_wrong_setting_is_named(wrong: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        slot_redundancy_loss(*sample(), num_picked=wrong)
    with pytest.raises(error, match=message):
        SlotRedundancyLoss(num_picked=wrong)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("attention", None, TypeError, r"`attention` must be a tensor; got NoneType"),
        ("attention", torch.zeros(2, 3, 5), ValueError, r"`attention` must have shape \(B, T, S, N\); got"),
        ("attention", torch.zeros(2, 3, 5, 8).int(), TypeError, r"`attention` must be floating point; got"),
        ("attention", torch.zeros(2, 0, 5, 8), ValueError, r"`attention` must have T >= 1; got T=0"),
        ("attention", torch.zeros(2, 3, 0, 8), ValueError, r"`attention` must have S >= 1; got S=0"),
        ("attention", torch.zeros(2, 3, 5, 0), ValueError, r"`attention` must have N >= 1; got N=0"),
        ("slots", [1.0], TypeError, r"`slots` must be a tensor; got list"),
        ("slots", torch.zeros(2, 3, 4, 6), ValueError, r"`slots` must have shape \(B=2, T=3, S=5, D\); got"),
        ("slots", torch.zeros(2, 3, 5, 0), ValueError, r"`slots` must have D >= 1; got D=0"),
        ("slots", torch.zeros(2, 3, 5, 6).long(), TypeError, r"`slots` must be floating point; got torch.int64"),
        ("slots", torch.zeros(2, 3, 5, 6, device="meta"), ValueError, r"`slots` must be on the device of `attention`"),
    ],
)
def test_a_wrong_tensor_is_named(name: str, value: Any, error: type[Exception], message: str) -> None:
    attention, slots = sample()
    with pytest.raises(error, match=message):
        slot_redundancy_loss(**{"attention": attention, "slots": slots, name: value})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dirt", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("frame", [0, -1])
def test_slots_that_are_not_finite_make_the_loss_and_its_gradient_nan(
    frame: int, dirt: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    attention = torch.randn(2, 3, 4, 5).softmax(3).requires_grad_()
    slots = torch.randn(2, 3, 4, 6).to(dtype)
    slots[1, frame, 2, 3] = dirt
    loss = slot_redundancy_loss(attention, slots)
    loss.backward()
    assert loss.isnan()
    assert attention.grad is not None
    assert attention.grad.isnan().any()
