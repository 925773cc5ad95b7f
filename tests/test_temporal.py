"""Temporal slot contrast: published numbers, the slow definition, what moves it and what does not, bad input."""

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
from ssync_loss import TemporalSlotContrastLoss
from ssync_loss.functional import temporal_slot_contrast_loss
from ssync_loss.methods.srl.reference import reference_temporal_slot_contrast_loss

NAN, INF = float("nan"), float("inf")
KINDS = pytest.mark.parametrize("kind", ["adjacent", "supervised"])
NEGATIVES = pytest.mark.parametrize("negatives", ["batch", "video"])


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return slots (B, T, S, D) that stay much the same over time."""
    clips, frames, num_slots, channels = shape or (2, 3, 4, 5)
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(clips, 1, num_slots, channels, generator=generator, dtype=torch.float64)
    moving = torch.randn(clips, frames, num_slots, channels, generator=generator, dtype=torch.float64)
    return (still + 0.3 * moving).to(dtype).requires_grad_()


def step(slots: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    return step_of(temporal_slot_contrast_loss, slots, **given)


def step_of(loss_of: Any, slots: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    source = slots.detach().requires_grad_()
    loss = loss_of(source, **given)
    (gradient,) = torch.autograd.grad(loss, source)
    return loss.detach(), gradient


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tol: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tol, atol=tol)


# --- values ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", golden_names("temporal_"))
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


def test_all_golden_files_are_here() -> None:
    assert len(golden_names("temporal_adjacent")) == 2
    assert len(golden_names("temporal_supervised")) == 3


@KINDS
@NEGATIVES
@settings(max_examples=25)
@given(
    shape=st.tuples(*(st.sampled_from(sizes) for sizes in ((1, 2, 3), (1, 2, 3, 4), (1, 2, 3), (1, 3)))),
    seed=st.integers(0, 2**32 - 1),
    temperature=st.sampled_from((0.1, 0.003, 2.0)),
    empty=st.booleans(),
)
def test_value_and_gradient_are_those_of_the_slow_definition(
    kind: str, negatives: str, shape: tuple[int, ...], seed: int, temperature: float, empty: bool
) -> None:
    slots = sample(*shape, dtype=torch.float64, seed=seed % 2**31).detach()
    if empty:
        slots[0, 0, 0] = 0
    knobs = {"kind": kind, "negatives": negatives, "temperature": temperature}
    assert_same(step(slots, **knobs), step_of(reference_temporal_slot_contrast_loss, slots, **knobs), 1e-9)


@KINDS
def test_a_clip_alone_has_no_others_to_be_told_apart_from(kind: str) -> None:
    slots = sample(1, 3, 4, 5, dtype=torch.float64)
    assert_same(step(slots, kind=kind, negatives="batch"), step(slots, kind=kind, negatives="video"), 1e-12)


@KINDS
def test_other_clips_are_negatives_of_the_batch_alone(kind: str) -> None:
    slots = sample(dtype=torch.float64)
    with_others, without = (temporal_slot_contrast_loss(slots, kind=kind, negatives=one) for one in ("batch", "video"))  # type: ignore[arg-type]
    assert with_others > without
    alone = torch.stack([temporal_slot_contrast_loss(one[None], kind=kind) for one in slots]).mean()  # type: ignore[arg-type]
    torch.testing.assert_close(without, alone, rtol=1e-12, atol=0)


@KINDS
@NEGATIVES
def test_the_order_of_slots_and_clips_means_nothing(kind: str, negatives: str) -> None:
    slots = sample(3, 3, 4, 5, dtype=torch.float64).detach()
    knobs = {"kind": kind, "negatives": negatives}
    loss, gradient = step(slots, **knobs)
    for order, axis in (([2, 0, 3, 1], 2), ([1, 2, 0], 0)):
        moved = slots.index_select(axis, torch.tensor(order))
        assert_same(step(moved, **knobs), (loss, gradient.index_select(axis, torch.tensor(order))), 1e-12)


def test_time_has_no_direction_for_the_supervised_kind_alone() -> None:
    slots = sample(dtype=torch.float64)
    for kind, same in (("supervised", True), ("adjacent", False)):
        forwards, backwards = (step(one, kind=kind)[0] for one in (slots, slots.flip(1)))
        assert torch.isclose(forwards, backwards, rtol=1e-9) == same


@KINDS
def test_slots_that_change_places_cost_more(kind: str) -> None:
    slots = sample().detach()
    swapped = slots.clone()
    swapped[:, 1] = swapped[:, 1].roll(1, dims=1)
    assert step(swapped, kind=kind)[0] > 5 * step(slots, kind=kind)[0]


def test_a_slot_that_is_found_again_costs_what_the_others_leave() -> None:
    # cosines 1 and 0: -log(e^20 / (e^20 + 2)) = 4.1e-9, which float32 cannot tell from 1
    slots = torch.eye(3).repeat(1, 2, 1, 1).requires_grad_()
    loss = temporal_slot_contrast_loss(slots, temperature=0.05)
    assert math.isclose(loss.item(), math.log1p(2 * math.exp(-20)), rel_tol=1e-5)


def test_the_supervised_kind_ignores_the_slot_itself_at_other_times() -> None:
    # one slot in four frames: frames 0 and 3 know one positive, which is all there is: log 1 = 0; frames 1 and 2
    # know two alike: log 2
    slots = torch.ones(1, 4, 1, 2)
    loss = temporal_slot_contrast_loss(slots, kind="supervised", temperature=0.07)
    assert math.isclose(loss.item(), math.log(2) / 2, rel_tol=1e-6)


def test_the_scale_of_the_supervised_kind_is_its_temperature_over_the_published_one() -> None:
    slots = torch.ones(1, 4, 1, 2)
    for temperature in (0.07, 0.14, 1.0):
        loss = temporal_slot_contrast_loss(slots, kind="supervised", temperature=temperature)
        assert math.isclose(loss.item(), math.log(2) / 2 * temperature / 0.07, rel_tol=1e-6)


@KINDS
def test_lengths_mean_nothing(kind: str) -> None:
    slots = sample(dtype=torch.float64)
    loss, gradient = step(slots, kind=kind)
    assert_same(step(slots.detach() * 7, kind=kind), (loss, gradient / 7), 1e-12)


# --- empty, single, undefined ---


@KINDS
@NEGATIVES
@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5)])
def test_no_time_and_no_clips_are_an_attached_zero(kind: str, negatives: str, shape: tuple[int, ...]) -> None:
    slots = torch.randn(shape, dtype=torch.float16).requires_grad_()
    loss = temporal_slot_contrast_loss(slots, kind=kind, negatives=negatives)  # type: ignore[arg-type]
    assert loss.item() == 0
    assert loss.dtype == torch.float32
    loss.backward()
    assert slots.grad is not None
    assert not slots.grad.any()


def test_a_slot_without_others_costs_nothing() -> None:
    loss, gradient = step(sample(2, 3, 1, 5), negatives="video")
    assert loss == 0
    assert torch.equal(gradient, torch.zeros(2, 3, 1, 5))


@KINDS
def test_a_slot_without_a_direction_gets_no_gradient(kind: str) -> None:
    slots = sample().detach()
    slots[0, 1, 2] = 0
    loss, gradient = step(slots, kind=kind)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[0, 1, 2].any()
    assert gradient[0, 1, 1].any()


@KINDS
@pytest.mark.parametrize("dirt", [NAN, INF, -INF])
def test_dirt_is_never_finite(kind: str, dirt: float) -> None:
    slots = sample().detach()
    slots[0, 0, 0, 0] = dirt
    assert step(slots, kind=kind)[0].isnan()


# --- gradients, types, graphs ---


@KINDS
@NEGATIVES
def test_gradcheck(kind: str, negatives: str) -> None:
    slots = sample(2, 3, 2, 3, dtype=torch.float64)
    knobs: dict[str, Any] = {"kind": kind, "negatives": negatives, "temperature": 0.5}
    assert torch.autograd.gradcheck(lambda one: temporal_slot_contrast_loss(one, **knobs), (slots,))


@KINDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_widened_and_their_gradient_is_of_their_type(kind: str, dtype: torch.dtype) -> None:
    slots = sample(dtype=dtype)
    loss, gradient = step(slots, kind=kind)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    wide, wide_gradient = step(slots.float(), kind=kind)
    assert torch.equal(loss, wide)
    assert torch.equal(gradient, wide_gradient.to(dtype))


@KINDS
def test_autocast_changes_nothing(kind: str) -> None:
    slots = sample()
    expected = step(slots, kind=kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = step(slots, kind=kind)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@KINDS
@NEGATIVES
def test_strides_mean_nothing(kind: str, negatives: str) -> None:
    slots = sample()
    view = slots.detach().permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not view.is_contiguous()
    knobs = {"kind": kind, "negatives": negatives}
    assert_same(step(view, **knobs), step(slots, **knobs), 1e-6)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@KINDS
@NEGATIVES
def test_a_step_compiles_to_one_graph(kind: Any, negatives: Any) -> None:
    slots = sample()
    criterion = TemporalSlotContrastLoss(kind=kind, negatives=negatives)
    counter = CompileCounterWithBackend("aot_eager")
    loss = torch.compile(criterion, fullgraph=True, backend=counter)(slots)
    (gradient,) = torch.autograd.grad(loss, slots)
    assert counter.frame_count == 1
    assert_same((loss.detach(), gradient), step(slots, kind=kind, negatives=negatives), 1e-6)


@KINDS
@NEGATIVES
def test_fake_tensors_carry_a_step(kind: Any, negatives: Any) -> None:
    with FakeTensorMode():
        slots = torch.randn(2, 3, 4, 5, requires_grad=True)
        temporal_slot_contrast_loss(slots, kind=kind, negatives=negatives).backward()
        assert slots.grad is not None
        assert slots.grad.shape == slots.shape


# --- the module, bad input ---


def test_a_module_remembers_its_settings() -> None:
    slots = sample()
    assert torch.equal(TemporalSlotContrastLoss()(slots), temporal_slot_contrast_loss(slots))
    criterion = TemporalSlotContrastLoss(temperature=0.2, kind="supervised", negatives="video")
    expected = temporal_slot_contrast_loss(slots, temperature=0.2, kind="supervised", negatives="video")
    assert torch.equal(criterion(slots), expected)
    assert repr(criterion) == "TemporalSlotContrastLoss(temperature=0.2, kind='supervised', negatives='video')"
    assert not criterion.state_dict()
    for twin in (pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion)):
        assert torch.equal(twin(slots), expected)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, r"`temperature` must be finite and above 0.0; got 0.0"),
        ({"temperature": "1"}, TypeError, r"`temperature` must be a number; got str"),
        ({"kind": "cyclic"}, ValueError, r"`kind` must be one of 'adjacent', 'supervised'; got 'cyclic'"),
        ({"negatives": "all"}, ValueError, r"`negatives` must be one of 'batch', 'video'; got 'all'"),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        temporal_slot_contrast_loss(sample(), **wrong)
    with pytest.raises(error, match=message):
        TemporalSlotContrastLoss(**wrong)


@pytest.mark.parametrize(
    ("slots", "error", "message"),
    [
        (None, TypeError, r"`slots` must be a tensor; got NoneType"),
        (torch.zeros(2, 3, 4), ValueError, r"`slots` must have shape \(B, T, S, D\); got \(2, 3, 4\)"),
        (torch.zeros(2, 3, 4, 5).long(), TypeError, r"`slots` must be floating point; got torch.int64"),
        (torch.zeros(2, 0, 4, 5), ValueError, r"`slots` must have T >= 1; got T=0"),
        (torch.zeros(2, 3, 0, 5), ValueError, r"`slots` must have S >= 1; got S=0"),
        (torch.zeros(2, 3, 4, 0), ValueError, r"`slots` must have D >= 1; got D=0"),
    ],
)
def test_wrong_slots_are_named(slots: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        temporal_slot_contrast_loss(slots)
