"""Affinity consistency: published numbers, the slow definition, masks, chunks, gradients, memory, bad input."""

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
from ssync_loss.methods.ino.affinity import AffinityConsistencyLoss, affinity_consistency_loss
from ssync_loss.methods.ino.reference import reference_affinity_consistency_loss
from test_memory import Meter

NAN, INF = float("nan"), float("inf")


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return tokens (B, T, N, D) of a student and of a teacher that has other channels."""
    clips, frames, tokens, channels = shape or (2, 3, 6, 4)
    generator = torch.Generator().manual_seed(seed)
    s = torch.randn(clips, frames, tokens, channels, generator=generator, dtype=torch.float64)
    t = torch.randn(clips, frames, tokens, channels + 1, generator=generator, dtype=torch.float64)
    return s.to(dtype).requires_grad_(), t.to(dtype)


def random_mask(clips: int, frames: int, tokens: int, kept: int, seed: int = 0) -> Tensor:
    """Return masks that keep as many positions in every frame, though others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(clips, frames, tokens, generator=generator).argsort(2) < kept


def step(s: Tensor, t: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    return step_of(affinity_consistency_loss, s, t, **given)


def step_of(loss_of: Any, s: Tensor, t: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    source = s.detach().requires_grad_()
    loss = loss_of(source, t, **given)
    (gradient,) = torch.autograd.grad(loss, source)
    return loss.detach(), gradient


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tol: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tol, atol=tol)


# --- values ---


@pytest.mark.parametrize("chunk_size", [None, 1, 5, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", golden_names("ino_affinity_"))
def test_published_numbers(name: str, dtype: torch.dtype, chunk_size: int | None) -> None:
    golden = Golden(name)
    student = golden.tensor("student", dtype).requires_grad_()
    teacher = golden.tensor("teacher", dtype).requires_grad_()
    loss = affinity_consistency_loss(
        student,
        teacher,
        mask=golden.tensor("mask"),
        tau_s=golden.number("tau_s"),
        tau_t=golden.number("tau_t"),
        chunk_size=chunk_size,
    )
    golden.assert_same_step(loss, student, "student")
    (unused,) = torch.autograd.grad(loss, teacher, allow_unused=True)
    assert unused is None


def test_all_golden_files_are_here() -> None:
    assert golden_names("ino_affinity_") == ["ino_affinity_all_tokens", "ino_affinity_tube_mask"]


@settings(max_examples=50)
@given(
    shape=st.tuples(*(st.sampled_from(sizes) for sizes in ((1, 2), (1, 2, 3), (1, 2, 4), (1, 3)))),
    seed=st.integers(0, 2**31),
    share=st.sampled_from((None, 0.0, 0.5, 1.0)),
    taus=st.sampled_from(((0.1, 0.04), (0.005, 0.002), (2.0, 1.0))),
    chunk_size=st.none() | st.integers(1, 12),
    zero=st.booleans(),
)
def test_value_and_gradient_are_those_of_the_slow_definition(
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


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), tau_s=st.sampled_from((0.03, 0.1, 1.0)))
def test_no_student_is_below_the_entropy_of_its_teacher(seed: int, tau_s: float) -> None:
    s, t = sample(dtype=torch.float64, seed=seed)
    units = torch.nn.functional.normalize(t, dim=3)
    rows = (units[:, :-1] @ units[:, 1:].mT / 0.04).softmax(3)
    entropy = torch.special.entr(rows).sum(3).mean()
    assert affinity_consistency_loss(s, t, tau_s=tau_s) > entropy
    same = affinity_consistency_loss(t, t, tau_s=0.04)
    torch.testing.assert_close(same, entropy, rtol=1e-12, atol=0)
    assert affinity_consistency_loss(t, t) > 1.01 * entropy


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), who=st.sampled_from(("s", "t")))
def test_lengths_and_a_common_rotation_of_one_of_both_mean_nothing(seed: int, who: str) -> None:
    pair: dict[str, Any] = dict(zip("st", sample(dtype=torch.float64, seed=seed), strict=True))
    loss = affinity_consistency_loss(**pair)
    generator = torch.Generator().manual_seed(seed)
    one: Tensor = pair[who].detach()
    rotation, _ = torch.linalg.qr(torch.randn(one.shape[3], one.shape[3], generator=generator, dtype=torch.float64))
    lengths = torch.rand(*one.shape[:3], 1, generator=generator, dtype=torch.float64) + 0.1
    moved = affinity_consistency_loss(**{**pair, who: one @ rotation * lengths})
    torch.testing.assert_close(moved, loss, rtol=1e-10, atol=0)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_the_order_of_the_tokens_of_a_frame_means_nothing(seed: int) -> None:
    s, t = sample(dtype=torch.float64, seed=seed)
    mask = random_mask(2, 3, 6, 4, seed)
    loss, gradient = step(s, t, mask=mask)
    order = torch.rand(2, 3, 6, generator=torch.Generator().manual_seed(seed)).argsort(2)

    def shuffled(tokens: Tensor) -> Tensor:
        return tokens.detach().take_along_dim(order.unsqueeze(3), 2)

    moved = step(shuffled(s), shuffled(t), mask=mask.take_along_dim(order, 2))
    assert_same(moved, (loss, shuffled(gradient)), 1e-11)


def test_the_order_of_one_frame_in_the_student_alone_means_something() -> None:
    _, t = sample(dtype=torch.float64)
    moved = t.clone()
    moved[:, 1] = moved[:, 1].roll(1, dims=1)
    assert affinity_consistency_loss(moved, t) > 2 * affinity_consistency_loss(t, t)


@pytest.mark.parametrize("num_tokens", [1, 2, 7])
def test_a_student_that_sees_no_difference_pays_the_logarithm_of_the_tokens(num_tokens: int) -> None:
    _, t = sample(2, 3, num_tokens, 4)
    loss = affinity_consistency_loss(torch.ones(2, 3, num_tokens, 5), t)
    assert math.isclose(loss.item(), math.log(num_tokens), rel_tol=1e-6, abs_tol=1e-7)
    half = random_mask(2, 3, 2 * num_tokens, num_tokens)
    _, t = sample(2, 3, 2 * num_tokens, 4)
    loss = affinity_consistency_loss(torch.ones(2, 3, 2 * num_tokens, 5), t, mask=half)
    assert math.isclose(loss.item(), math.log(num_tokens), rel_tol=1e-6, abs_tol=1e-7)


def test_frames_are_compared_with_the_next_one_in_one_direction() -> None:
    s, t = sample(1, 4, 5, 3, dtype=torch.float64)
    parts = [affinity_consistency_loss(s[:, i : i + 2], t[:, i : i + 2]) for i in range(3)]
    torch.testing.assert_close(affinity_consistency_loss(s, t), torch.stack(parts).mean(), rtol=1e-12, atol=0)
    forwards, backwards = (affinity_consistency_loss(s.flip(i), t.flip(i)) for i in (0, 1))
    assert not torch.isclose(forwards, backwards, rtol=1e-3)


def test_a_grid_is_a_list_of_its_patches() -> None:
    s, t = sample()
    grids = [one.detach().mT.unflatten(3, (2, 3)) for one in (s, t)]
    mask = random_mask(2, 3, 6, 4)
    for listed, on_grid in ((None, None), (mask, mask.unflatten(2, (2, 3)))):
        loss, gradient = step(grids[0], grids[1], mask=on_grid)
        assert_same((loss, gradient.flatten(3).mT), step(s, t, mask=listed), 1e-6)


def test_kept_positions_may_be_given_as_lists() -> None:
    s, t = sample(dtype=torch.float64)
    tube = torch.tensor([True, False, True, True, False, True])
    loss, gradient = step(s, t, mask=tube.expand(2, 3, 6))
    assert not gradient[:, :, ~tube].any()
    listed = step(s[:, :, tube], t[:, :, tube])
    assert_same((loss, gradient[:, :, tube]), listed, 1e-12)


def test_dropped_positions_may_hold_anything() -> None:
    s, t = sample()
    mask = random_mask(2, 3, 6, 4)
    expected = step(s, t, mask=mask)
    s = s.detach().clone()
    s[~mask] = NAN
    t[~mask] = INF
    assert_same(step(s, t, mask=mask), expected, 0.0)


# --- empty, single, undefined ---


@pytest.mark.parametrize("shape", [(0, 3, 6, 4), (2, 1, 6, 4), (2, 3, 0, 4)])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_nothing_to_compare_is_an_attached_zero(shape: tuple[int, ...], chunk_size: int | None) -> None:
    loss, gradient = step(*sample(*shape), chunk_size=chunk_size)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros(shape))


def test_an_attached_zero_is_as_wide_as_the_wider_of_both() -> None:
    for dtype, other, expected in (
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
    ):
        for shape in ((2, 1, 6, 4), (2, 3, 6, 4)):
            s, t = sample(*shape)
            loss, gradient = step(s.to(dtype), t.to(other))
            assert (loss.dtype, gradient.dtype) == (expected, dtype)
            assert (loss == 0) == (shape[1] == 1)


def test_a_mask_that_keeps_nothing_is_an_attached_zero() -> None:
    loss, gradient = step(*sample(), mask=torch.zeros(2, 3, 6, dtype=torch.bool))
    assert loss == 0
    assert torch.equal(gradient, torch.zeros(2, 3, 6, 4))


def test_vectors_without_a_direction_get_no_gradient() -> None:
    s, t = sample()
    s = s.detach()
    s[0, 1, 2] = 0
    loss, gradient = step(s, t)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[0, 1, 2].any()
    assert gradient[0, 1, 3].any()


@pytest.mark.parametrize("dirt", [NAN, INF])
@pytest.mark.parametrize("dirty", [0, 1])
def test_dirt_is_never_finite(dirty: int, dirt: float) -> None:
    pair = [one.detach().clone() for one in sample()]
    pair[dirty][0, 1, 2, 0] = dirt
    assert step(pair[0], pair[1])[0].isnan()


@pytest.mark.parametrize("tau", [1e-4, 50.0])
def test_extreme_temperatures_are_finite_and_right(tau: float) -> None:
    s, t = sample()
    mask = random_mask(2, 3, 6, 4)
    for knobs in ({"tau_s": tau}, {"tau_t": tau}):
        expected = step_of(reference_affinity_consistency_loss, s, t, mask=mask, **knobs)
        scale = expected[1].abs().max().item()
        actual = step(s, t, mask=mask, **knobs)
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=2e-5 * scale)


# --- gradients ---


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(chunk_size: int | None, masked: bool) -> None:
    s, t = sample(2, 3, 3, 2, dtype=torch.float64)
    mask = random_mask(2, 3, 3, 2) if masked else None
    assert torch.autograd.gradcheck(
        lambda one: affinity_consistency_loss(one, t, mask=mask, tau_s=0.5, chunk_size=chunk_size), (s,)
    )


def test_only_the_student_gets_a_gradient() -> None:
    s, t = sample()
    affinity_consistency_loss(s, t.requires_grad_()).backward()
    assert t.grad is None
    assert s.grad is not None
    assert s.grad.any()
    assert not affinity_consistency_loss(s.detach(), t).requires_grad


def test_without_a_gradient_the_value_is_the_same() -> None:
    s, t = sample()
    loss = affinity_consistency_loss(s, t)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(affinity_consistency_loss(s, t), loss)


def test_the_gradient_follows_what_comes_after_the_loss() -> None:
    s, t = sample(dtype=torch.float64)
    loss = affinity_consistency_loss(s, t)
    (once,) = torch.autograd.grad(loss, s, retain_graph=True)
    (again,) = torch.autograd.grad(-3 * loss.square(), s)
    torch.testing.assert_close(again, -6 * loss.detach() * once, rtol=1e-12, atol=0)


def test_a_second_derivative_is_refused() -> None:
    s, t = sample()
    (gradient,) = torch.autograd.grad(affinity_consistency_loss(s, t), s, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


# --- types, layouts, graphs ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_widened_and_their_gradient_is_of_their_type(dtype: torch.dtype) -> None:
    s, t = sample(dtype=dtype)
    loss, gradient = step(s, t)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    wide = step(s.float(), t.float())
    assert torch.equal(loss, wide[0])
    assert torch.equal(gradient, wide[1].to(dtype))


def test_the_wider_of_two_types_is_computed_in() -> None:
    s, t = sample()
    loss, gradient = step(s, t.double())
    assert (loss.dtype, gradient.dtype) == (torch.float64, torch.float32)
    assert_same((loss, gradient.double()), step(s.double(), t.double()), 1e-6)


def test_autocast_changes_nothing() -> None:
    pair = sample()
    expected = step(*pair)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = step(*pair)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_strides_mean_nothing() -> None:
    s, t = sample()
    views = [one.detach().transpose(0, 2).contiguous().transpose(0, 2) for one in (s, t)]
    assert not any(one.is_contiguous() for one in views)
    assert_same(step(views[0], views[1]), step(s, t), 1e-6)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_compiles_to_one_graph(chunk_size: int | None, masked: bool) -> None:
    s, t = sample()
    mask = random_mask(2, 3, 6, 4) if masked else None
    counter = CompileCounterWithBackend("aot_eager")
    criterion = AffinityConsistencyLoss(chunk_size=chunk_size)
    loss = torch.compile(criterion, fullgraph=True, backend=counter)(s, t, mask=mask)
    (gradient,) = torch.autograd.grad(loss, s)
    assert counter.frame_count == 1
    assert_same((loss.detach(), gradient), step(s, t, mask=mask), 1e-6)


@pytest.mark.usefixtures("_fresh_compiler")
def test_counts_that_cannot_be_looked_at_are_taken_patch_by_patch() -> None:
    # as on an accelerator: frames of 6, 4 and 0 kept positions
    mask = torch.ones(1, 3, 6, dtype=torch.bool)
    mask[:, 1, :2] = mask[:, 2] = False
    s, t = sample(1, 3, 6, 4, dtype=torch.float64)
    compiled = torch.compile(affinity_consistency_loss, backend="eager", fullgraph=True)
    expected = reference_affinity_consistency_loss(s, t, mask=mask)
    torch.testing.assert_close(compiled(s, t, mask=mask), expected, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("_fresh_compiler")
def test_batches_of_any_size_share_a_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(affinity_consistency_loss, fullgraph=True, backend=counter)
    for clips in (3, 5):
        s, t = sample(clips, 3, 6, 4)
        for one in (s, t):
            # an error where the code fixes the size
            torch._dynamo.mark_dynamic(one, 0)
        loss = compiled(s, t)
        (gradient,) = torch.autograd.grad(loss, s)
        assert_same((loss.detach(), gradient), step(s, t), 1e-6)
    assert counter.frame_count == 1


# deprecations and hints of the compiler's own modules: nothing a loss can change
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.usefixtures("_fresh_compiler")
def test_the_default_compiler_gives_the_values_of_eager(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # whole tiles of vectors, and parts of tiles
    s, t = sample(2, 3, 36, 16)
    loss = torch.compile(affinity_consistency_loss, fullgraph=True)(s, t)
    (gradient,) = torch.autograd.grad(loss, s)
    expected = step(s, t)
    assert_same((loss.detach(),), expected[:1], 1e-6)
    torch.testing.assert_close(gradient, expected[1], rtol=0, atol=1e-5 * expected[1].abs().max().item())


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_fake_tensors_carry_a_step(chunk_size: int | None) -> None:
    with FakeTensorMode():
        s = torch.randn(2, 3, 6, 4, requires_grad=True)
        mask = torch.ones(2, 3, 6, dtype=torch.bool)
        affinity_consistency_loss(s, torch.randn(2, 3, 6, 5), mask=mask, chunk_size=chunk_size).backward()
        assert s.grad is not None
        assert s.grad.shape == s.shape


# --- memory and work ---


def cost(clips: int, frames: int, num_tokens: int, chunk_size: int | None) -> Meter:
    s, t = sample(clips, frames, num_tokens, 3)
    meter = Meter([s, t])
    with meter:
        affinity_consistency_loss(s, t, chunk_size=chunk_size).backward()
    return meter


def test_a_chunk_bounds_what_is_held() -> None:
    for num_tokens in (100, 200):
        # of 6 pairs of frames: two maps, and beside them about ten lists of features
        whole, linear = 4 * 6 * num_tokens**2, 10 * 4 * 4 * 2 * num_tokens * 4
        assert 2 * whole <= cost(2, 4, num_tokens, None).peak < 2 * whole + linear
        for rows in (10, 3 * num_tokens):
            assert 2 * 4 * rows * num_tokens <= cost(2, 4, num_tokens, rows).peak < 2 * 4 * rows * num_tokens + linear


def test_clips_and_frames_are_not_walked_through() -> None:
    assert len({cost(*size, 2, None).num_operators for size in ((2, 3), (3, 5), (9, 4))}) == 1


def test_nothing_quadratic_waits_for_the_backward() -> None:
    s, t = sample(1, 2, 50, 3)
    with Meter([s, t]) as meter:
        loss = affinity_consistency_loss(s, t)
        assert meter.alive < 50 * 50
    assert loss.requires_grad


# --- the module, bad input ---


def test_a_module_remembers_its_settings() -> None:
    pair = sample()
    mask = random_mask(2, 3, 6, 4)
    assert torch.equal(AffinityConsistencyLoss()(*pair), affinity_consistency_loss(*pair, tau_s=0.1, tau_t=0.04))
    criterion = AffinityConsistencyLoss(tau_s=0.2, tau_t=0.1, chunk_size=5)
    assert repr(criterion) == "AffinityConsistencyLoss(tau_s=0.2, tau_t=0.1, chunk_size=5)"
    assert not criterion.state_dict()
    expected = affinity_consistency_loss(*pair, mask=mask, tau_s=0.2, tau_t=0.1, chunk_size=5)
    for twin in (criterion, pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion)):
        assert torch.equal(twin(*pair, mask=mask), expected)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"tau_s": 0.0}, ValueError, r"`tau_s` must be finite and above 0.0; got 0.0"),
        ({"tau_t": -1.0}, ValueError, r"`tau_t` must be finite and above 0.0; got -1.0"),
        ({"tau_t": "0.1"}, TypeError, r"`tau_t` must be a number; got str"),
        ({"chunk_size": 0}, ValueError, r"`chunk_size` must be at least 1; got 0"),
        ({"chunk_size": 2.0}, TypeError, r"`chunk_size` must be an integer; got float"),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        affinity_consistency_loss(*sample(), **wrong)
    with pytest.raises(error, match=message):
        AffinityConsistencyLoss(**wrong)


BITS = torch.ones(2, 3, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("s", None, TypeError, r"`s` must be a tensor; got NoneType"),
        ("s", torch.zeros(2, 3, 6), ValueError, r"`s` must have shape \(B, T, D, H, W\); got \(2, 3, 6\)"),
        ("s", torch.zeros(2, 3, 6, 4).int(), TypeError, r"`s` must be floating point; got"),
        ("s", torch.zeros(2, 0, 6, 4), ValueError, r"`s` must have T >= 1; got T=0"),
        ("s", torch.zeros(2, 3, 6, 0), ValueError, r"`s` must have D >= 1; got D=0"),
        ("s", torch.zeros(2, 3, 4, 0, 2), ValueError, r"`s` must have H >= 1; got H=0"),
        ("t", [1.0], TypeError, r"`t` must be a tensor; got list"),
        ("t", torch.zeros(2, 3, 5, 4), ValueError, r"`t` must have shape \(B=2, T=3, N=6, C\); got \(2, 3, 5, 4\)"),
        ("t", torch.zeros(2, 3, 4, 2, 3), ValueError, r"`t` must have shape \(B=2, T=3, N=6, C\); got \(2, 3, 4, 2"),
        ("t", torch.zeros(2, 3, 6, 4).long(), TypeError, r"`t` must be floating point; got torch.int64"),
        ("t", torch.zeros(2, 3, 6, 4, device="meta"), ValueError, r"`t` must be on the device of `s`"),
        ("mask", BITS[:, :, :5], ValueError, r"`mask` must have shape \(B=2, T=3, N=6\); got \(2, 3, 5\)"),
        ("mask", BITS[0], ValueError, r"`mask` must have shape \(B=2, T=3, N=6\); got \(3, 6\)"),
        ("mask", BITS.float(), TypeError, r"`mask` must be boolean; got torch.float32"),
        ("mask", BITS.to("meta"), ValueError, r"`mask` must be on the device of `s`"),
        ("mask", BITS.tril(2), ValueError, r"`mask` must keep the same number of positions in every frame; got 3 to 5"),
    ],
)
def test_a_wrong_tensor_is_named(name: str, value: Any, error: type[Exception], message: str) -> None:
    s, t = sample()
    mask = None
    with pytest.raises(error, match=message):
        affinity_consistency_loss(**{"s": s, "t": t, "mask": mask, name: value})
