"""Affinity consistency: published values, the reference, masks, chunks, gradients, memory, errors."""

import math
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contract import Case, LossContract
from golden_neighbors import Golden, golden_names
from meter import Meter
from ssync_loss import AffinityConsistencyLoss
from ssync_loss.functional import affinity_consistency_loss
from ssync_loss.methods.ino.reference import reference_affinity_consistency_loss
from steps import assert_same, step_of


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return tokens (B, T, N, D) of a student, and of a teacher with more channels."""
    clips, frames, tokens, channels = shape or (2, 3, 6, 4)
    generator = torch.Generator().manual_seed(seed)
    s = torch.randn(clips, frames, tokens, channels, generator=generator, dtype=torch.float64)
    t = torch.randn(clips, frames, tokens, channels + 1, generator=generator, dtype=torch.float64)
    return s.to(dtype).requires_grad_(), t.to(dtype)


def random_mask(clips: int, frames: int, tokens: int, kept: int, seed: int = 0) -> Tensor:
    """Return masks that keep the same number of positions in every frame, but different positions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(clips, frames, tokens, generator=generator).argsort(2) < kept


def step(s: Tensor, t: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    return step_of(affinity_consistency_loss, s, t, **given)


# --- values ---


@pytest.mark.parametrize("chunk_size", [None, 1, 5, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", golden_names("ino_affinity_", 2))
def test_published_numbers(name: str, dtype: torch.dtype, chunk_size: int | None) -> None:
    golden = Golden(name)
    student = golden.tensor("student", dtype).requires_grad_()
    teacher = golden.tensor("teacher", dtype).requires_grad_()
    knobs = golden.numbers("tau_s", "tau_t") | {"mask": golden.tensor("mask"), "chunk_size": chunk_size}
    loss = affinity_consistency_loss(student, teacher, **knobs)
    golden.assert_same_step(loss, student, "student")
    (unused,) = torch.autograd.grad(loss, teacher, allow_unused=True)
    assert unused is None


@settings(max_examples=50)
@given(
    shape=st.tuples(*(st.sampled_from(sizes) for sizes in ((1, 2), (1, 2, 3), (1, 2, 4), (1, 3)))),
    seed=st.integers(0, 2**31),
    share=st.sampled_from((None, 0.0, 0.5, 1.0)),
    taus=st.sampled_from(((0.1, 0.04), (0.005, 0.002), (2.0, 1.0))),
    chunk_size=st.none() | st.integers(1, 12),
    zero=st.booleans(),
)
def test_value_and_gradient_equal_the_reference(
    shape: tuple[int, ...],
    seed: int,
    share: float | None,
    taus: tuple[float, float],
    chunk_size: int | None,
    zero: bool,
) -> None:
    s, t = sample(*shape, dtype=torch.float64, seed=seed)
    s = s.detach()
    if zero:
        s[0, 0, 0] = 0
        t[-1, -1, -1] = 0
    clips, frames, tokens, _ = shape
    mask = None if share is None else random_mask(clips, frames, tokens, round(share * tokens), seed)
    knobs: dict[str, Any] = {"mask": mask, "tau_s": taus[0], "tau_t": taus[1]}
    expected = step_of(reference_affinity_consistency_loss, s, t, **knobs)
    assert_same(step(s, t, chunk_size=chunk_size, **knobs), expected, 1e-9)


@pytest.mark.parametrize("num_tokens", [1, 2, 7])
def test_equal_tokens_have_the_logarithm_of_their_number(num_tokens: int) -> None:
    _, t = sample(2, 3, num_tokens, 4)
    loss = affinity_consistency_loss(torch.ones(2, 3, num_tokens, 5), t)
    assert math.isclose(loss.item(), math.log(num_tokens), rel_tol=1e-6, abs_tol=1e-7)


def test_a_grid_equals_the_list_of_its_patches() -> None:
    s, t = sample()
    grids = [one.detach().mT.unflatten(3, (2, 3)) for one in (s, t)]
    mask = random_mask(2, 3, 6, 4)
    for listed, on_grid in ((None, None), (mask, mask.unflatten(2, (2, 3)))):
        loss, gradient = step(grids[0], grids[1], mask=on_grid)
        assert_same((loss, gradient.flatten(3).mT), step(s, t, mask=listed), 1e-6)


def test_a_mask_equals_the_list_of_kept_positions() -> None:
    s, t = sample(dtype=torch.float64)
    tube = torch.tensor([True, False, True, True, False, True])
    loss, gradient = step(s, t, mask=tube.expand(2, 3, 6))
    assert not gradient[:, :, ~tube].any()
    listed = step(s[:, :, tube], t[:, :, tube])
    assert_same((loss, gradient[:, :, tube]), listed, 1e-12)


# --- edge cases ---


@pytest.mark.parametrize("tau", [1e-4, 50.0])
def test_extreme_temperatures(tau: float) -> None:
    s, t = sample()
    mask = random_mask(2, 3, 6, 4)
    for knobs in ({"tau_s": tau}, {"tau_t": tau}):
        expected = step_of(reference_affinity_consistency_loss, s, t, mask=mask, **knobs)
        scale = expected[1].abs().max().item()
        actual = step(s, t, mask=mask, **knobs)
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=2e-5 * scale)


@pytest.mark.usefixtures("fresh_compiler")
def test_unequal_counts_under_compile_are_weighted_per_patch() -> None:
    # compiled code cannot check the counts: frames keep 6, 4 and 0 positions
    mask = torch.ones(1, 3, 6, dtype=torch.bool)
    mask[:, 1, :2] = mask[:, 2] = False
    s, t = sample(1, 3, 6, 4, dtype=torch.float64)
    compiled = torch.compile(affinity_consistency_loss, backend="eager", fullgraph=True)
    expected = reference_affinity_consistency_loss(s, t, mask=mask)
    torch.testing.assert_close(compiled(s, t, mask=mask), expected, rtol=1e-12, atol=0)


# --- memory and work ---


def cost(clips: int, frames: int, num_tokens: int, chunk_size: int | None) -> Meter:
    s, t = sample(clips, frames, num_tokens, 3)
    meter = Meter([s, t])
    with meter:
        affinity_consistency_loss(s, t, chunk_size=chunk_size).backward()
    return meter


def test_chunks_limit_the_memory() -> None:
    for num_tokens in (100, 200):
        # two maps of 6 pairs of frames, and the memory of about ten features
        whole, linear = 4 * 6 * num_tokens**2, 10 * 4 * 4 * 2 * num_tokens * 4
        assert 2 * whole <= cost(2, 4, num_tokens, None).peak < 2 * whole + linear
        for rows in (10, 3 * num_tokens):
            assert 2 * 4 * rows * num_tokens <= cost(2, 4, num_tokens, rows).peak < 2 * 4 * rows * num_tokens + linear


def test_there_is_no_loop_over_clips_and_frames() -> None:
    assert len({cost(*size, 2, None).num_operators for size in ((2, 3), (3, 5), (9, 4))}) == 1


def test_nothing_quadratic_is_saved_for_backward() -> None:
    s, t = sample(1, 2, 50, 3)
    with Meter([s, t]) as meter:
        loss = affinity_consistency_loss(s, t)
        assert meter.alive < 50 * 50
    assert loss.requires_grad


# --- the contract of every loss ---

BITS = torch.ones(2, 3, 6, dtype=torch.bool)


class TestWholeFrames(LossContract):
    loss = AffinityConsistencyLoss
    function = staticmethod(affinity_consistency_loss)
    settings: ClassVar = {"tau_s": 0.2, "tau_t": 0.1}
    inert: ClassVar = {"chunk_size": 5}
    not_applicable: ClassVar = {"poison": "every position is kept"}
    refused: ClassVar = [
        ({"tau_s": 0.0}, ValueError, r"`tau_s` must be finite and above 0.0; got 0.0"),
        ({"tau_t": -1.0}, ValueError, r"`tau_t` must be finite and above 0.0; got -1.0"),
        ({"chunk_size": 0}, ValueError, r"`chunk_size` must be at least 1; got 0"),
        ({"chunk_size": 2.0}, TypeError, r"`chunk_size` must be an integer; got float"),
        ({"s": torch.zeros(2, 3, 6)}, ValueError, r"`s` must have shape \(B, T, D, H, W\); got \(2, 3, 6\)"),
        ({"s": torch.zeros(2, 0, 6, 4)}, ValueError, r"`s` must have T >= 1; got T=0"),
        ({"s": torch.zeros(2, 3, 6, 0)}, ValueError, r"`s` must have D >= 1; got D=0"),
        ({"s": torch.zeros(2, 3, 4, 0, 2)}, ValueError, r"`s` must have H >= 1; got H=0"),
        ({"t": torch.zeros(2, 3, 5, 4)}, ValueError, r"`t` must have shape \(B=2, T=3, N=6, C\); got \(2, 3, 5, 4\)"),
        ({"t": torch.zeros(2, 3, 4, 2, 3)}, ValueError, r"`t` must have shape \(B=2, T=3, N=6, C\); got \(2, 3, 4, 2"),
    ]

    def case(self, *shape: int) -> Case:
        s, t = sample(*shape)
        return Case(self.make(), {"s": s}, {"t": t})

    def large_case(self) -> Case:
        return self.case(2, 3, 36, 16)

    def empty_cases(self, case: Case) -> dict[str, Case]:
        return {
            "one frame": case.mapped(lambda one: one[:, :1]),
            "no tokens": case.mapped(lambda one: one[:, :, :0]),
            **super().empty_cases(case),
        }


class TestMasked(TestWholeFrames):
    not_applicable: ClassVar = {}
    refused: ClassVar = [
        ({"mask": BITS[:, :, :5]}, ValueError, r"`mask` must have shape \(B=2, T=3, N=6\); got \(2, 3, 5\)"),
        ({"mask": BITS[0]}, ValueError, r"`mask` must have shape \(B=2, T=3, N=6\); got \(3, 6\)"),
        ({"mask": BITS.tril(2)}, ValueError, r"`mask` must keep the same number of positions .*; got 3 to 5"),
    ]

    def case(self, *shape: int) -> Case:
        case = super().case(*shape)
        clips, frames, tokens, _ = case.inputs["s"].shape
        return case._replace(others={**case.others, "mask": random_mask(clips, frames, tokens, 2 * tokens // 3)})

    def empty_cases(self, case: Case) -> dict[str, Case]:
        return {"nothing kept": case.replaced(mask=case.others["mask"] & False), **super().empty_cases(case)}

    def unselected(self, case: Case) -> dict[str, Tensor]:
        dropped = ~case.others["mask"].unsqueeze(3)
        return {"s": dropped, "t": dropped}


class TestInChunks(TestMasked):
    knobs: ClassVar = {"chunk_size": 5}
    inert: ClassVar = {"chunk_size": None}
    one_size = "the loop over chunks is unrolled"
    not_applicable: ClassVar = {"default_compiler": "the unrolled loop over chunks takes it a minute"}
