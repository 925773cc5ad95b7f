"""Semantic consistency: published numbers, the slow definition, invariances, streaming, memory, bad input."""

import copy
import math
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from golden_neighbors import Golden, golden_names
from ssync_loss.methods.smtc.reference import reference_semantic_consistency_loss
from ssync_loss.methods.smtc.semantic import EPSILON, SemanticConsistencyLoss, semantic_consistency_loss
from test_memory import Meter

NAN, INF = float("nan"), float("inf")


class Case(NamedTuple):
    logits: Tensor
    teacher: Tensor
    feats: Tensor


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, channels: int = 5) -> Case:
    """Return maps of a student and a teacher, and features; the shape is (B, T, S, H, W)."""
    clips, frames, slots, height, width = shape or (2, 3, 4, 2, 3)
    generator = torch.Generator().manual_seed(seed)
    logits, teacher, feats = (
        torch.randn(clips, frames, depth, height, width, generator=generator, dtype=torch.float64).to(dtype)
        for depth in (slots, slots, channels)
    )
    return Case(2 * logits, 2 * teacher, feats)


def step(case: Case, **given: Any) -> tuple[Tensor, Tensor]:
    return step_of(semantic_consistency_loss, case, **given)


def step_of(loss_of: Any, case: Case, **given: Any) -> tuple[Tensor, Tensor]:
    source = case.logits.detach().requires_grad_()
    loss = loss_of(source, case.teacher, case.feats, **given)
    (gradient,) = torch.autograd.grad(loss, source)
    return loss.detach(), gradient


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tol: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        scale = max(other.abs().max().item(), 1.0) if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=tol, atol=tol * scale)


DRAWN = {
    "shape": st.tuples(*(st.sampled_from(sizes) for sizes in ((1, 2), (1, 2, 3, 4), (1, 3), (1, 2), (1, 3)))),
    "seed": st.integers(0, 2**31),
    # the second takes logarithms
    "eps": st.sampled_from((0.05, 0.02, 1.0)),
    "iters": st.integers(1, 4),
    "marginals": st.sampled_from(("l1", "uniform")),
}

# --- values ---


@pytest.mark.parametrize("chunk_size", [1, 2, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", golden_names("semantic_consistency_"))
def test_published_numbers(name: str, dtype: torch.dtype, chunk_size: int | None) -> None:
    golden = Golden(name)
    logits = golden.tensor("Z", dtype).requires_grad_()
    loss = semantic_consistency_loss(
        logits,
        golden.tensor("Z_teacher", dtype),
        golden.tensor("feats", dtype),
        eps=golden.number("eps"),
        iters=golden.count("iters"),
        marginals=golden.text("marginals", ""),  # type: ignore[arg-type]
        chunk_size=chunk_size,
    )
    golden.assert_same_step(loss, logits, "Z")
    assert golden.number("log_eps") == EPSILON


def test_all_golden_files_are_here() -> None:
    assert len(golden_names("semantic_consistency_")) == 2


@settings(max_examples=40)
@given(**DRAWN, empty=st.sampled_from(("nothing", "a patch", "a frame")))
def test_value_and_gradient_are_those_of_the_slow_definition(
    shape: tuple[int, ...], seed: int, empty: str, **knobs: Any
) -> None:
    case = sample(*shape, dtype=torch.float64, seed=seed)
    if empty == "a patch":
        case.feats[0, -1, :, 0, 0] = 0
    if empty == "a frame":
        case.feats[0, -1] = 0
    assert_same(step(case, **knobs), step_of(reference_semantic_consistency_loss, case, **knobs), 1e-10)


@settings(max_examples=20)
@given(**DRAWN, chunk_size=st.none() | st.integers(1, 7))
def test_a_chunk_size_changes_nothing(shape: tuple[int, ...], seed: int, chunk_size: int | None, **knobs: Any) -> None:
    case = sample(*shape, dtype=torch.float64, seed=seed)
    assert_same(step(case, chunk_size=chunk_size, **knobs), step(case, **knobs), 1e-12)


@pytest.mark.parametrize("eps", [0.05, 0.01])
def test_pooling_is_the_loss_of_coarser_patches(eps: float) -> None:
    case = sample(1, 2, 3, 4, 6, dtype=torch.float64)
    assert_same(step(case, pool=2, eps=eps), step_of(reference_semantic_consistency_loss, case, pool=2, eps=eps), 1e-10)


def test_pooling_what_is_constant_changes_nothing() -> None:
    coarse = sample(dtype=torch.float64)
    fine = Case(*(one.repeat_interleave(2, 3).repeat_interleave(2, 4) for one in coarse))
    loss, gradient = step(fine, pool=2)
    expected, coarse_gradient = step(coarse)
    spread = coarse_gradient.repeat_interleave(2, 3).repeat_interleave(2, 4) / 4
    assert_same((loss, gradient), (expected, spread), 1e-12)


@settings(max_examples=20)
@given(**DRAWN)
def test_uniform_masks_cost_the_logarithm_of_the_slots(shape: tuple[int, ...], seed: int, **knobs: Any) -> None:
    case = sample(*shape, dtype=torch.float64, seed=seed)
    loss, _ = step(case._replace(logits=case.logits * 0), **knobs)
    expected = math.log(shape[2]) if shape[1] > 1 else 0.0
    assert math.isclose(loss.item(), expected, rel_tol=1e-7, abs_tol=1e-7)


def test_patches_that_are_found_again_in_their_slot_cost_nothing() -> None:
    feats = torch.eye(6).view(1, 1, 6, 2, 3).repeat(1, 2, 1, 1, 1)
    labels = torch.tensor([[0, 1, 2], [0, 1, 2]])
    masks = 50 * torch.nn.functional.one_hot(labels, 3).movedim(-1, 0).float().repeat(1, 2, 1, 1, 1)
    assert step(Case(masks, masks, feats))[0] < 1e-4
    # and what moves is followed
    moved, moved_feats = masks.clone(), feats.clone()
    moved[:, 1], moved_feats[:, 1] = masks[:, 1].flip(3), feats[:, 1].flip(3)
    assert step(Case(moved, moved, moved_feats))[0] < 1e-4
    assert step(Case(moved, moved, feats))[0] > 5


def test_a_slot_without_a_patch_costs_what_the_logarithm_allows() -> None:
    feats = torch.eye(2).view(1, 1, 2, 1, 2).repeat(1, 2, 1, 1, 1)
    masks = torch.tensor([200.0, 0.0]).view(1, 1, 2, 1, 1).expand(1, 2, 2, 1, 2)
    loss, gradient = step(Case(masks, masks.flip(2), feats))
    assert math.isclose(loss.item(), -math.log(1e-8), rel_tol=1e-5)
    assert gradient.isfinite().all()


@settings(max_examples=20)
@given(**DRAWN)
def test_the_order_of_patches_slots_and_frames_means_nothing(shape: tuple[int, ...], seed: int, **knobs: Any) -> None:
    case = sample(*shape, dtype=torch.float64, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    _, frames, slots, height, width = shape
    loss, gradient = step(case, **knobs)

    # in each frame another order
    orders = [torch.randperm(height * width, generator=generator) for _ in range(frames)]

    def shuffled(maps: Tensor) -> Tensor:
        rows = [maps[:, t].flatten(2)[:, :, order] for t, order in enumerate(orders)]
        return torch.stack(rows, 1).view(maps.shape)

    assert_same(step(Case(*map(shuffled, case)), **knobs), (loss, shuffled(gradient)), 1e-10)
    order = torch.randperm(slots, generator=generator)
    renamed = case._replace(logits=case.logits[:, :, order], teacher=case.teacher[:, :, order])
    assert_same(step(renamed, **knobs), (loss, gradient[:, :, order]), 1e-10)
    order = torch.randperm(frames, generator=generator)
    assert_same(step(Case(*(one[:, order] for one in case)), **knobs), (loss, gradient[:, order]), 1e-10)


@settings(max_examples=20)
@given(**DRAWN)
def test_the_loss_is_never_negative(shape: tuple[int, ...], seed: int, **knobs: Any) -> None:
    assert step(sample(*shape, seed=seed), **knobs)[0] >= -1e-7


def test_the_student_follows_the_teacher_and_not_the_other_way_around() -> None:
    case = sample(dtype=torch.float64)
    swapped = case._replace(logits=case.teacher, teacher=case.logits)
    assert abs(step(case)[0] - step(swapped)[0]) > 1e-3


def test_lengths_of_features_mean_nothing() -> None:
    case = sample(dtype=torch.float64)
    assert_same(step(case._replace(feats=case.feats * 7)), step(case), 1e-12)


# --- empty, single, undefined ---


@pytest.mark.parametrize("shape", [(2, 1, 4, 2, 3), (0, 3, 4, 2, 3), (0, 1, 4, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_no_pairs_are_an_attached_zero(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    loss, gradient = step(sample(*shape, dtype=dtype))
    assert loss == 0
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(gradient, torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("eps", [0.05, 0.01])
@pytest.mark.parametrize("marginals", ["l1", "uniform"])
def test_features_without_a_direction_are_finite(eps: float, marginals: Any) -> None:
    case = sample()
    for silence in ((0, 0, slice(None), 0, 0), (0, 1), (slice(None), slice(0, 2)), (slice(None),)):
        case.feats[silence] = 0
        loss, gradient = step(case, eps=eps, marginals=marginals)
        assert loss.isfinite()
        assert gradient.isfinite().all()
    # without any weight nothing is asked for
    assert (loss == 0) == (marginals == "l1")
    assert gradient.any() == (marginals == "uniform")


@pytest.mark.parametrize("eps", [0.05, 0.01])
@pytest.mark.parametrize("dirt", [NAN, INF, -INF])
@pytest.mark.parametrize("dirty", ["logits", "teacher", "feats"])
@pytest.mark.parametrize("everywhere", [True, False])
def test_dirt_is_never_finite(everywhere: bool, dirty: str, dirt: float, eps: float) -> None:
    case = sample()
    where = (slice(None), slice(None)) if everywhere else (0, 0)
    getattr(case, dirty)[(*where, 0, 0, 0)] = dirt
    loss, gradient = step(case, eps=eps)
    if dirt == -INF and dirty != "feats":
        # a slot that may not have a patch
        assert loss.isfinite()
        assert gradient.isfinite().all()
    else:
        assert loss.isnan()


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.04, 0.0399, 100.0])
def test_extreme_entropies_are_finite_and_right(eps: float) -> None:
    case = sample()
    loss, gradient = step(case, eps=eps)
    assert gradient.isfinite().all()
    wide, wide_gradient = step(Case(*(one.double() for one in case)), eps=eps)
    assert_same((loss.double(), gradient.double()), (wide, wide_gradient), 0.05 if eps < 1e-4 else 1e-3)


# --- gradients ---


@pytest.mark.parametrize("knobs", [{}, {"eps": 0.01}, {"pool": 2, "marginals": "uniform"}])
def test_gradcheck(knobs: dict[str, Any]) -> None:
    case = sample(1, 3, 3, 2, 2, dtype=torch.float64)
    source = case.logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda one: semantic_consistency_loss(one, case.teacher, case.feats, **knobs), (source,)
    )


def test_only_the_student_gets_a_gradient() -> None:
    case = Case(*(one.requires_grad_() for one in sample()))
    semantic_consistency_loss(*case).backward()
    assert case.teacher.grad is None
    assert case.feats.grad is None
    assert case.logits.grad is not None
    assert case.logits.grad.any()
    fixed = semantic_consistency_loss(case.logits.detach(), case.teacher, case.feats)
    assert not fixed.requires_grad


# --- types, layouts, graphs ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_widened_and_their_gradient_is_of_their_type(dtype: torch.dtype) -> None:
    case = sample(dtype=dtype)
    loss, gradient = step(case)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    wide, wide_gradient = step(Case(*(one.float() for one in case)))
    assert torch.equal(loss, wide)
    assert torch.equal(gradient, wide_gradient.to(dtype))


def test_the_widest_type_is_computed_in() -> None:
    case = sample()
    loss, gradient = step(case._replace(feats=case.feats.double()))
    assert (loss.dtype, gradient.dtype) == (torch.float64, torch.float32)


@pytest.mark.parametrize("eps", [0.05, 0.01])
def test_autocast_changes_nothing(eps: float) -> None:
    case = sample()
    expected = step(case, eps=eps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = step(case, eps=eps)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_strides_mean_nothing() -> None:
    case = sample()
    view = Case(*(one.permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0) for one in case))
    assert not any(one.is_contiguous() for one in view)
    assert_same(step(view), step(case), 1e-6)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    "knobs", [{"iters": 1}, {"iters": 2, "eps": 0.01, "pool": 2, "chunk_size": None, "marginals": "uniform"}]
)
def test_a_step_compiles_to_one_graph_for_batches_of_any_size(knobs: dict[str, Any]) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(SemanticConsistencyLoss(**knobs), fullgraph=True, backend=counter)
    for clips in (3, 5):
        case = sample(clips, 3, 3, 2, 4)
        for one in case:
            torch._dynamo.mark_dynamic(one, 0)
        source = case.logits.requires_grad_()
        loss = compiled(*case)
        (gradient,) = torch.autograd.grad(loss, source)
        assert_same((loss.detach(), gradient), step(case, **knobs), 1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("eps", [0.05, 0.01])
def test_fake_tensors_carry_a_step(eps: float) -> None:
    with FakeTensorMode():
        logits = torch.randn(2, 3, 4, 2, 3, requires_grad=True)
        loss = semantic_consistency_loss(logits, torch.randn(2, 3, 4, 2, 3), torch.randn(2, 3, 5, 2, 3), eps=eps)
        loss.backward()
        assert logits.grad is not None
        assert logits.grad.shape == logits.shape


# --- memory ---


def peak_in_kernels(frames: int, **given: Any) -> float:
    """Peak of a step, in kernels (B, N, N)."""
    case = sample(2, frames, 2, 16, 16, channels=3)
    with Meter(case) as meter:
        step(case, **given)
    return float(meter.peak / (2 * 256**2 * 4))


@pytest.mark.parametrize("frames", [2, 4, 8])
def test_one_pair_of_frames_is_held_at_a_time(frames: int) -> None:
    # the rest are maps, linear in the frames
    assert 1.0 < peak_in_kernels(frames) < 1.2 + 0.05 * frames
    assert 2.0 < peak_in_kernels(frames, eps=0.01) < 3.2 + 0.05 * frames


def test_as_many_pairs_are_held_as_are_asked_for() -> None:
    assert 3.0 < peak_in_kernels(4, chunk_size=3) < 3.7
    assert 6.0 < peak_in_kernels(4, chunk_size=None) < 6.9


def test_pooling_shrinks_what_is_held() -> None:
    assert peak_in_kernels(2, pool=4) < 0.2


def test_nothing_quadratic_waits_for_the_backward() -> None:
    case = sample(1, 3, 2, 8, 8)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().nbytes() // tensor.itemsize)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        semantic_consistency_loss(case.logits.requires_grad_(), case.teacher, case.feats)
    assert 0 < max(saved) <= case.logits.numel()


# --- the module, bad input ---


def test_a_module_remembers_its_settings() -> None:
    case = sample(1, 3, 4, 2, 4)
    assert torch.equal(SemanticConsistencyLoss()(*case), semantic_consistency_loss(*case))
    knobs: dict[str, Any] = {"eps": 0.1, "iters": 2, "marginals": "uniform", "pool": 2, "chunk_size": 3}
    criterion = SemanticConsistencyLoss(**knobs)
    shown = "SemanticConsistencyLoss(eps=0.1, iters=2, marginals='uniform', pool=2, chunk_size=3)"
    assert repr(criterion) == shown
    assert not criterion.state_dict()
    for twin in (criterion, pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion)):
        assert torch.equal(twin(*case), semantic_consistency_loss(*case, **knobs))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"eps": 0.0}, ValueError, r"`eps` must be finite and above 0.0; got 0.0"),
        ({"eps": NAN}, ValueError, r"`eps` must be finite and above 0.0; got nan"),
        ({"iters": 0}, ValueError, r"`iters` must be at least 1; got 0"),
        ({"marginals": "l2"}, ValueError, r"`marginals` must be one of 'l1', 'uniform'; got 'l2'"),
        ({"pool": 0}, ValueError, r"`pool` must be at least 1; got 0"),
        ({"pool": 2.0}, TypeError, r"`pool` must be an integer; got float"),
        ({"chunk_size": 0}, ValueError, r"`chunk_size` must be at least 1; got 0"),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        semantic_consistency_loss(*sample(), **wrong)
    with pytest.raises(error, match=message):
        SemanticConsistencyLoss(**wrong)


def test_a_square_that_does_not_fill_the_grid_is_named() -> None:
    with pytest.raises(ValueError, match=r"`pool` must divide the grid, H=2 and W=3; got 2"):
        semantic_consistency_loss(*sample(), pool=2)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("logits", None, TypeError, r"`logits` must be a tensor; got NoneType"),
        ("logits", torch.zeros(2, 3, 4, 6), ValueError, r"`logits` must have shape \(B, T, S, H, W\); got"),
        ("logits", torch.zeros(2, 3, 4, 2, 3).int(), TypeError, r"`logits` must be floating point; got torch.int32"),
        ("logits", torch.zeros(2, 0, 4, 2, 3), ValueError, r"`logits` must have T >= 1; got T=0"),
        ("logits", torch.zeros(2, 3, 0, 2, 3), ValueError, r"`logits` must have S >= 1; got S=0"),
        ("logits", torch.zeros(2, 3, 4, 0, 3), ValueError, r"`logits` must have H >= 1; got H=0"),
        ("teacher_logits", torch.zeros(2, 3, 5, 2, 3), ValueError, r"`teacher_logits` must have shape \(B=2, T=3, S=4"),
        ("teacher_logits", torch.zeros(2, 3, 4, 2, 3).bool(), TypeError, r"`teacher_logits` must be floating point"),
        ("teacher_logits", torch.zeros(2, 3, 4, 2, 3, device="meta"), ValueError, r"`teacher_logits` must be on the"),
        ("feats", torch.zeros(2, 3, 5, 3, 2), ValueError, r"`feats` must have shape \(B=2, T=3, D, H=2, W=3\); got"),
        ("feats", torch.zeros(2, 3, 0, 2, 3), ValueError, r"`feats` must have D >= 1; got D=0"),
        ("feats", torch.zeros(2, 3, 5, 2, 3).long(), TypeError, r"`feats` must be floating point; got torch.int64"),
        ("feats", torch.zeros(2, 3, 5, 2, 3, device="meta"), ValueError, r"`feats` must be on the device of `logits`"),
    ],
)
def test_a_wrong_tensor_is_named(name: str, value: Any, error: type[Exception], message: str) -> None:
    logits, teacher, feats = sample()
    with pytest.raises(error, match=message):
        semantic_consistency_loss(**{"logits": logits, "teacher_logits": teacher, "feats": feats, name: value})
