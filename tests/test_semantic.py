"""Semantic consistency: published values, the reference, edge cases, streaming, memory, errors."""

import math
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contract import INF, NAN, Case, LossContract
from golden_neighbors import Golden, golden_names
from meter import Meter
from ssync_loss import SemanticConsistencyLoss
from ssync_loss.functional import semantic_consistency_loss
from ssync_loss.methods.smtc.reference import reference_semantic_consistency_loss
from steps import assert_same, saved_elements, step_of


class Scene(NamedTuple):
    logits: Tensor
    teacher: Tensor
    feats: Tensor


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, channels: int = 5) -> Scene:
    """Return maps of a student and a teacher, and features, for the shape (B, T, S, H, W)."""
    clips, frames, slots, height, width = shape or (2, 3, 4, 2, 3)
    generator = torch.Generator().manual_seed(seed)
    logits, teacher, feats = (
        torch.randn(clips, frames, depth, height, width, generator=generator, dtype=torch.float64).to(dtype)
        for depth in (slots, slots, channels)
    )
    return Scene(2 * logits, 2 * teacher, feats)


def step(case: Scene, loss_of: Any = semantic_consistency_loss, **given: Any) -> tuple[Tensor, Tensor]:
    return step_of(loss_of, *case, **given)


DRAWN = {
    "shape": st.tuples(*(st.sampled_from(sizes) for sizes in ((1, 2), (1, 2, 3, 4), (1, 3), (1, 2), (1, 3)))),
    "seed": st.integers(0, 2**31),
    # 0.02 selects the computation in logarithms
    "eps": st.sampled_from((0.05, 0.02, 1.0)),
    "iters": st.integers(1, 4),
    "marginals": st.sampled_from(("l1", "uniform")),
}

# --- values ---


@pytest.mark.parametrize("chunk_size", [1, 2, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", golden_names("semantic_consistency_", 2))
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


@settings(max_examples=40)
@given(**DRAWN, empty=st.sampled_from(("nothing", "a patch", "a frame")), chunk_size=st.none() | st.integers(1, 7))
def test_value_and_gradient_equal_the_reference(
    shape: tuple[int, ...], seed: int, empty: str, chunk_size: int | None, **knobs: Any
) -> None:
    case = sample(*shape, dtype=torch.float64, seed=seed)
    if empty == "a patch":
        case.feats[0, -1, :, 0, 0] = 0
    if empty == "a frame":
        case.feats[0, -1] = 0
    expected = step(case, reference_semantic_consistency_loss, **knobs)
    assert_same(step(case, chunk_size=chunk_size, **knobs), expected, 1e-10)


@pytest.mark.parametrize("eps", [0.05, 0.01])
def test_pooling_equals_the_reference(eps: float) -> None:
    case = sample(1, 2, 3, 4, 6, dtype=torch.float64)
    assert_same(step(case, pool=2, eps=eps), step(case, reference_semantic_consistency_loss, pool=2, eps=eps), 1e-10)


@settings(max_examples=20)
@given(**DRAWN)
def test_uniform_masks_have_the_logarithm_of_the_slots(shape: tuple[int, ...], seed: int, **knobs: Any) -> None:
    case = sample(*shape, dtype=torch.float64, seed=seed)
    loss, _ = step(case._replace(logits=case.logits * 0), **knobs)
    expected = math.log(shape[2]) if shape[1] > 1 else 0.0
    assert math.isclose(loss.item(), expected, rel_tol=1e-7, abs_tol=1e-7)


def test_the_loss_of_an_empty_slot_is_bounded() -> None:
    feats = torch.eye(2).view(1, 1, 2, 1, 2).repeat(1, 2, 1, 1, 1)
    masks = torch.tensor([200.0, 0.0]).view(1, 1, 2, 1, 1).expand(1, 2, 2, 1, 2)
    loss, gradient = step(Scene(masks, masks.flip(2), feats))
    assert math.isclose(loss.item(), -math.log(1e-8), rel_tol=1e-5)
    assert gradient.isfinite().all()


# --- edge cases ---


@pytest.mark.parametrize("eps", [0.05, 0.01])
@pytest.mark.parametrize("marginals", ["l1", "uniform"])
def test_features_without_a_direction_are_finite(eps: float, marginals: Any) -> None:
    case = sample()
    for silence in ((0, 0, slice(None), 0, 0), (0, 1), (slice(None), slice(0, 2)), (slice(None),)):
        case.feats[silence] = 0
        loss, gradient = step(case, eps=eps, marginals=marginals)
        assert loss.isfinite()
        assert gradient.isfinite().all()
    # with "l1" a frame without features has no target
    assert (loss == 0) == (marginals == "l1")
    assert gradient.any() == (marginals == "uniform")


@pytest.mark.parametrize("eps", [0.05, 0.01])
@pytest.mark.parametrize("which", ["logits", "teacher"])
@pytest.mark.parametrize("where", [(slice(None), slice(None)), (0, 0)])
def test_a_slot_may_be_minus_infinity(where: tuple[Any, Any], which: str, eps: float) -> None:
    case = sample()
    getattr(case, which)[where[0], where[1], 0, 0, 0] = -INF
    loss, gradient = step(case, eps=eps)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.04, 0.0399, 100.0])
def test_extreme_entropies(eps: float) -> None:
    case = sample()
    loss, gradient = step(case, eps=eps)
    assert gradient.isfinite().all()
    wide, wide_gradient = step(Scene(*(one.double() for one in case)), eps=eps)
    assert_same((loss.double(), gradient.double()), (wide, wide_gradient), 0.05 if eps < 1e-4 else 1e-3)


# --- memory ---


def peak_in_kernels(frames: int, **given: Any) -> float:
    """Return the peak memory of a step, in multiples of a kernel (B, N, N)."""
    case = sample(2, frames, 2, 16, 16, channels=3)
    with Meter(case) as meter:
        step(case, **given)
    return float(meter.peak / (2 * 256**2 * 4))


@pytest.mark.parametrize("frames", [2, 4, 8])
def test_one_pair_of_frames_is_in_memory(frames: int) -> None:
    # the rest is maps, which are linear in the frames
    assert 1.0 < peak_in_kernels(frames) < 1.2 + 0.05 * frames
    assert 2.0 < peak_in_kernels(frames, eps=0.01) < 3.2 + 0.05 * frames


def test_chunk_size_sets_the_number_of_pairs_in_memory() -> None:
    assert 3.0 < peak_in_kernels(4, chunk_size=3) < 3.7
    assert 6.0 < peak_in_kernels(4, chunk_size=None) < 6.9


def test_nothing_quadratic_is_saved_for_backward() -> None:
    case = sample(1, 3, 2, 8, 8)
    case.logits.requires_grad_()
    assert 0 < max(saved_elements(semantic_consistency_loss, *case)) <= case.logits.numel()


# --- the contract of every loss ---


def test_pool_must_divide_the_grid() -> None:
    with pytest.raises(ValueError, match=r"`pool` must divide the grid, H=2 and W=3; got 2"):
        semantic_consistency_loss(*sample(), pool=2)


class TestContract(LossContract):
    loss = SemanticConsistencyLoss
    function = staticmethod(semantic_consistency_loss)
    twice_differentiable = True
    settings: ClassVar = {"eps": 0.1, "iters": 2, "marginals": "uniform", "pool": 2}
    inert: ClassVar = {"chunk_size": 2}
    not_applicable: ClassVar = {"poison": "every patch of every frame counts"}
    refused: ClassVar = [
        ({"eps": 0.0}, ValueError, r"`eps` must be finite and above 0.0; got 0.0"),
        ({"eps": NAN}, ValueError, r"`eps` must be finite and above 0.0; got nan"),
        ({"iters": 0}, ValueError, r"`iters` must be at least 1; got 0"),
        ({"pool": 0}, ValueError, r"`pool` must be at least 1; got 0"),
        ({"chunk_size": 0}, ValueError, r"`chunk_size` must be at least 1; got 0"),
        ({"logits": torch.zeros(2, 0, 3, 2, 4)}, ValueError, r"`logits` must have T >= 1; got T=0"),
        ({"logits": torch.zeros(2, 3, 0, 2, 4)}, ValueError, r"`logits` must have S >= 1; got S=0"),
        ({"logits": torch.zeros(2, 3, 3, 0, 4)}, ValueError, r"`logits` must have H >= 1; got H=0"),
        ({"teacher_logits": torch.zeros(2, 3, 5, 2, 4)}, ValueError, r"`teacher_logits` must have shape .* S=3"),
        ({"feats": torch.zeros(2, 3, 5, 4, 2)}, ValueError, r"`feats` must have shape \(B=2, T=3, D, H=2, W=4\); got"),
        ({"feats": torch.zeros(2, 3, 0, 2, 4)}, ValueError, r"`feats` must have D >= 1; got D=0"),
    ]

    def case(self, *shape: int) -> Case:
        scene = sample(*(shape or (2, 3, 3, 2, 4)))
        return Case(self.make(), {"logits": scene.logits}, {"teacher_logits": scene.teacher, "feats": scene.feats})

    def large_case(self) -> Case:
        return self.case(2, 2, 3, 6, 6)

    def empty_cases(self, case: Case) -> dict[str, Case]:
        return {"one frame": case.mapped(lambda one: one[:, :1]), **super().empty_cases(case)}


class TestInLogarithms(TestContract):
    """The contract with a small entropy, which uses logarithms."""

    knobs: ClassVar = {"eps": 0.01, "iters": 2, "marginals": "uniform", "pool": 2, "chunk_size": None}
    settings: ClassVar = {"eps": 0.02, "iters": 3, "marginals": "l1", "pool": 1}
    inert: ClassVar = {"chunk_size": 1}
