"""Structure of features: published numbers, the slow definition, both filters, chunks, gradients, memory, bad input."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from golden_neighbors import Golden, deviation, golden_names
from ssync_loss.methods.slotcurri.reference import reference_structure_aware_loss
from ssync_loss.methods.slotcurri.structure import StructureAwareLoss, structure_aware_loss
from test_memory import Meter

NAN, INF = float("nan"), float("inf")
# of the largest magnitude
EXACT = {torch.float64: 1e-10, torch.float32: 5e-6}
FILTERS = pytest.mark.parametrize("filters", ["torch", "kornia"])


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return features that resemble their target; the shape is (B, T, D, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    target, noise = torch.randn(2, *(shape or (2, 4, 5, 5, 4)), generator=generator, dtype=torch.float64)
    return (target + noise / 2).to(dtype).requires_grad_(), target.to(dtype)


def step(pred: Tensor, target: Tensor, loss_of: Any = structure_aware_loss, **given: Any) -> tuple[Tensor, Tensor]:
    pred = pred.detach().requires_grad_()
    loss = loss_of(pred, target, **given)
    (gradient,) = torch.autograd.grad(loss, pred)
    return loss.detach(), gradient


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tol: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        scale = other.abs().max().item() if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=tol * scale)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Draw small clips, some with short axes, twins, constants or an outlier channel; and settings."""
    shape = [draw(st.sampled_from(sizes)) for sizes in ((1, 2), (1, 2, 3, 4), (1, 2, 3), (1, 2, 3, 5), (1, 3, 4))]
    pred, target = (one.detach().clone() for one in sample(*shape, dtype=torch.float64, seed=draw(st.integers(0, 999))))
    what = draw(st.sampled_from(["plain", "twins", "constant channel", "outlier", "shifted"]))
    if what == "twins":
        pred[:, :, 0] = target[:, :, 0]
    if what == "constant channel":
        pred[:, :, -1] = target[:, :, -1] = 3.0
    if what == "outlier":
        pred[:, :, 0] *= 50
    if what == "shifted":
        pred += 7
    return (
        pred,
        target,
        {
            "window": draw(st.sampled_from((1, 3, 3, 3, 5))),
            "sigma": draw(st.sampled_from((1.5, 0.5))),
            "k1": draw(st.sampled_from((0.01, 0.3))),
            "k2": draw(st.sampled_from((0.03, 0.1))),
            "eps": draw(st.sampled_from((1e-6, 0.1))),
            "normalize": draw(st.sampled_from(("joint", "channel"))),
        },
    )


# --- values ---


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("name", "filters"), [("ssim3d_T4", "torch"), ("ssim3d_T4", "kornia"), ("ssim3d_T4", "auto"), ("ssim3d_T1", "auto")]
)
def test_published_numbers(name: str, filters: Any, dtype: torch.dtype, chunk_size: int | None) -> None:
    golden = Golden(name)
    pred, target = (golden.tensor(one, dtype).requires_grad_() for one in ("pred", "target"))
    loss = structure_aware_loss(
        pred,
        target,
        window=golden.count("window"),
        sigma=golden.number("sigma"),
        k1=golden.number("k1"),
        k2=golden.number("k2"),
        eps=golden.number("eps"),
        chunk_size=chunk_size,
        filters=filters,
    )
    (gradient,) = torch.autograd.grad(loss, pred)
    assert loss.dtype == dtype
    assert deviation(loss, golden.tensor("loss_exact_window_f64")) <= EXACT[dtype]
    assert deviation(gradient, golden.tensor("grad_pred_exact_window_f64")) <= EXACT[dtype]
    # the public code rounds its window
    assert deviation(loss, golden.tensor("loss_f64")) <= 5e-6
    assert deviation(gradient, golden.tensor("grad_pred_f64")) <= 5e-6
    assert golden.count("window") == 3
    assert [int(golden.tensor(f"flow_{one}")) for one in ("pred", "target")] == [1, 0]
    (unused,) = torch.autograd.grad(structure_aware_loss(pred, target), target, allow_unused=True)
    assert unused is None


def test_the_defaults_are_the_published_settings() -> None:
    assert golden_names("ssim3d") == ["ssim3d_T1", "ssim3d_T4"]
    for name in golden_names("ssim3d"):
        golden = Golden(name)
        wanted = {key: golden.number(key) for key in ("window", "sigma", "k1", "k2", "eps")}
        assert wanted == {key: StructureAwareLoss().settings[key] for key in wanted}


@settings(max_examples=80)
@given(case=cases(), chunk_size=st.sampled_from((None, 1, 2, 64)))
def test_value_and_gradient_are_those_of_the_slow_definition(
    case: tuple[Tensor, Tensor, dict[str, Any]], chunk_size: int | None
) -> None:
    pred, target, knobs = case
    expected = step(pred, target, reference_structure_aware_loss, **knobs)
    actual = step(pred, target, chunk_size=chunk_size, filters="torch", **knobs)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("normalize", ["joint", "channel"])
@pytest.mark.parametrize("window", [1, 3, 5])
def test_both_filters_agree(window: int, normalize: str) -> None:
    data = [one.detach() for one in sample(2, 6, 7, 6, 8)]
    knobs: dict[str, Any] = {"window": window, "normalize": normalize, "chunk_size": 3}
    expected = step(*(one.double() for one in data), filters="torch", **knobs)
    assert_same(step(*(one.double() for one in data), filters="kornia", **knobs), expected, 1e-12)
    for filters, tol in (("kornia", 5e-5), ("torch", 2e-6)):
        loss, gradient = step(*data, filters=filters, **knobs)
        assert_same((loss.double(), gradient.double()), expected, tol)
    chosen = step(*data, **knobs)
    assert all(torch.equal(*both) for both in zip(chosen, (loss, gradient), strict=True))


def test_an_outlier_channel_hides_the_others_unless_each_has_its_own_extremes() -> None:
    pred, target = (one.detach().clone() for one in sample(1, 4, 16, 8, 8))
    pred[:, :, 3] *= 20
    target[:, :, 3] = pred[:, :, 3]
    joint = structure_aware_loss(pred, target)
    assert structure_aware_loss(pred, target, normalize="channel") > 5 * joint


def test_own_filters_keep_what_outliers_leave() -> None:
    pred, target = (one.detach().clone() for one in sample(1, 4, 16, 8, 8))
    # all else lies near 1, where squares are large beside their differences
    pred[:, :, 0, 0, 0] = target[:, :, 0, 0, 0] = -20.0
    expected = step(pred.double(), target.double(), filters="torch")
    for filters, tol in (("torch", 5e-6), ("kornia", 5e-4)):
        loss, gradient = step(pred, target, filters=filters)
        assert_same((loss.double(), gradient.double()), expected, tol)


def test_a_dense_convolution_gives_the_same() -> None:
    pred, target = (one.detach() for one in sample(2, 4, 3, 5, 6, dtype=torch.float64))
    low = torch.minimum(pred.amin((1, 2, 3, 4)), target.amin((1, 2, 3, 4))).view(2, 1, 1, 1, 1)
    high = torch.maximum(pred.amax((1, 2, 3, 4)), target.amax((1, 2, 3, 4))).view(2, 1, 1, 1, 1)
    x, y = (((one - low) / (high - low + 1e-6)).transpose(1, 2).flatten(0, 1).unsqueeze(1) for one in (pred, target))
    line = torch.exp(-(torch.arange(-1.0, 2.0, dtype=torch.float64) ** 2) / 4.5)
    cube = torch.einsum("i,j,k->ijk", line, line, line)
    cube = (cube / cube.sum()).view(1, 1, 3, 3, 3)

    def mean(values: Tensor) -> Tensor:
        return torch.nn.functional.conv3d(values, cube)

    mean_x, mean_y = mean(x), mean(y)
    covariance = mean(x * y) - mean_x * mean_y
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    index = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
    index = index / ((mean_x**2 + mean_y**2 + 1e-4) * (variances + 9e-4))
    for filters in ("torch", "kornia"):
        actual = structure_aware_loss(pred, target, filters=filters)
        torch.testing.assert_close(actual, 1 - index.mean(), rtol=1e-10, atol=0)


@FILTERS
def test_what_is_equal_costs_nothing(filters: Any) -> None:
    _, target = sample(2, 4, 5, 6, 6)
    for features in (target, torch.full_like(target, 3.5), torch.zeros_like(target)):
        loss, gradient = step(features, features, filters=filters)
        # own filters lose nothing, here
        assert loss.abs() <= (0.0 if filters == "torch" else 1e-6)
        # kornia's leave 1e-8 or so, which the 1e-6 that constants are divided by magnifies
        assert gradient.abs().max() <= (0.0 if filters == "torch" else 1e-2)


@settings(max_examples=40)
@given(case=cases(), a=st.sampled_from((0.5, 3.0)), b=st.sampled_from((0.0, -2.0)))
def test_symmetric_within_its_range_and_blind_to_order_and_scale(
    case: tuple[Tensor, Tensor, dict[str, Any]], a: float, b: float
) -> None:
    pred, target, knobs = case
    knobs["eps"] = 1e-14
    loss = structure_aware_loss(pred, target, **knobs)
    assert -1e-12 <= loss <= 2 + 1e-12
    order = torch.randperm(pred.shape[2], generator=torch.Generator().manual_seed(0))
    same = [
        (target, pred),
        (pred[:, :, order], target[:, :, order]),
        (pred.flip(1), target.flip(1)),
        (pred.flip(3), target.flip(3)),
        (pred.flip(4), target.flip(4)),
        (pred.mT, target.mT),
        (pred.flip(0), target.flip(0)),
        # beyond rounding of what is constant
        (a * pred + b, a * target + b),
    ]
    for one, other in same:
        torch.testing.assert_close(structure_aware_loss(one, other, **knobs), loss, rtol=0, atol=1e-9)


@pytest.mark.parametrize("normalize", ["joint", "channel"])
def test_clips_do_not_see_each_other(normalize: Any) -> None:
    pred, target = sample(3, 4, 5, 5, 4, dtype=torch.float64)
    loss, gradient = step(pred, target, normalize=normalize)
    parts = [step(pred[b : b + 1], target[b : b + 1], normalize=normalize) for b in range(3)]
    assert_same((loss,), (torch.stack([part[0] for part in parts]).mean(),), 1e-12)
    assert_same((gradient,), (torch.cat([part[1] for part in parts]) / 3,), 1e-12)


def test_channels_see_each_other_only_through_joint_extremes() -> None:
    pred, target = sample(1, 4, 3, 5, 4, dtype=torch.float64)
    stretch = torch.tensor([1.0, 10.0, 2.0], dtype=torch.float64).view(3, 1, 1)
    pred, target = pred * stretch, target * stretch
    single = torch.stack([structure_aware_loss(pred[:, :, c : c + 1], target[:, :, c : c + 1]) for c in range(3)])
    torch.testing.assert_close(structure_aware_loss(pred, target, normalize="channel"), single.mean())
    assert structure_aware_loss(pred, target) < 0.9 * single.mean()


@pytest.mark.parametrize("frames", [1, 2])
def test_fewer_than_three_frames_are_compared_frame_by_frame(frames: int) -> None:
    pred, target = sample(1, frames, 5, 5, 4, dtype=torch.float64)
    knobs: dict[str, Any] = {"normalize": "channel"}
    # the same values in every frame: extremes are those of the clip
    still, still_target = (one[:, :1].expand(-1, frames, -1, -1, -1) for one in (pred, target))
    assert_same(step(still, still_target, **knobs)[:1], step(pred[:, :1], target[:, :1], **knobs)[:1], 1e-12)
    assert_same(step(pred, target), step(pred, target, reference_structure_aware_loss), 1e-10)
    # three such frames are averaged over time, to the same
    thrice = [one[:, :1].expand(-1, 3, -1, -1, -1) for one in (pred, target)]
    torch.testing.assert_close(structure_aware_loss(*thrice), structure_aware_loss(pred[:, :1], target[:, :1]))


def test_it_sees_what_a_mean_squared_error_does_not() -> None:
    _, target = sample(1, 4, 3, 8, 8)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(1)).sign()
    shifted, noisy = target + 0.5, target + 0.5 * noise
    torch.testing.assert_close((shifted - target).square().mean(), (noisy - target).square().mean())
    assert structure_aware_loss(shifted, target) < 0.5 * structure_aware_loss(noisy, target)


# --- empty, undefined ---


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("normalize", ["joint", "channel"])
@pytest.mark.parametrize("frames", [1, 4])
def test_no_clips_are_an_attached_zero(frames: int, normalize: Any, chunk_size: int | None) -> None:
    loss, gradient = step(*sample(0, frames, 5, 5, 4), normalize=normalize, chunk_size=chunk_size)
    assert loss.item() == 0
    assert gradient.shape == (0, frames, 5, 5, 4)


@FILTERS
@pytest.mark.parametrize("dirt", [NAN, INF, -INF])
@pytest.mark.parametrize("normalize", ["joint", "channel"])
@pytest.mark.parametrize("dirty", [0, 1])
def test_dirt_is_never_finite(dirty: int, normalize: Any, dirt: float, filters: Any) -> None:
    data = [one.detach().clone() for one in sample()]
    data[dirty][0, 0, 0, 0, 0] = dirt
    assert structure_aware_loss(data[0], data[1], normalize=normalize, filters=filters).isnan()


def test_a_clip_without_contrast_has_finite_gradients() -> None:
    flat = torch.ones(1, 4, 3, 5, 5)
    # float32 keeps no contrast below 1e-7, which eps sees as a tenth of the whole
    almost = flat + 1e-7 * torch.randn(1, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    for pred, target in ((flat, flat), (almost, flat), (flat, almost), (flat * 0, flat * 0)):
        for filters in ("torch", "kornia"):
            loss, gradient = step(pred, target, filters=filters)
            assert loss.isfinite()
            assert gradient.isfinite().all()


# --- gradients ---


@FILTERS
@pytest.mark.parametrize("normalize", ["joint", "channel"])
def test_gradcheck_with_extremes_held(filters: Any, normalize: Any) -> None:
    pred, target = sample(1, 4, 2, 3, 4, dtype=torch.float64)
    # the target's extremes are those of both, so that moving pred moves neither
    target[:, 0, :, 0, 0], target[:, 0, :, 0, 1] = -9.0, 9.0
    assert torch.autograd.gradcheck(
        lambda one: structure_aware_loss(one, target, normalize=normalize, filters=filters, chunk_size=1), (pred,)
    )


def test_extremes_get_no_gradient_of_their_own() -> None:
    pred, target = sample(dtype=torch.float64)
    loss, gradient = step(pred, target)
    scaled = step(3 * pred.detach() + 1, 3 * target + 1, eps=3e-6)
    assert_same(scaled, (loss, gradient / 3), 1e-9)


def test_only_pred_gets_a_gradient() -> None:
    pred, target = sample()
    target.requires_grad_()
    structure_aware_loss(pred, target).backward()
    assert target.grad is None
    assert pred.grad is not None
    assert pred.grad.any()
    assert not structure_aware_loss(pred.detach(), target).requires_grad


@FILTERS
def test_without_a_gradient_the_value_is_the_same(filters: Any) -> None:
    data = sample()
    loss = structure_aware_loss(*data, filters=filters)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(structure_aware_loss(*data, filters=filters), loss)


@FILTERS
def test_the_gradient_follows_what_comes_after_the_loss(filters: Any) -> None:
    pred, target = sample(dtype=torch.float64)
    loss = structure_aware_loss(pred, target, filters=filters)
    (once,) = torch.autograd.grad(loss, pred, retain_graph=True)
    (again,) = torch.autograd.grad(-3 * loss.square(), pred)
    torch.testing.assert_close(again, -6 * loss.detach() * once, rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(structure_aware_loss(pred, target), pred, create_graph=True)[0].sum().backward()


@FILTERS
def test_functional_gradients_work(filters: Any) -> None:
    pred, target = sample()
    actual = torch.func.grad(lambda one: structure_aware_loss(one, target, filters=filters))(pred.detach())
    assert_same((actual,), step(pred, target, filters=filters)[1:], 1e-6)


# --- types, layouts, graphs ---


@FILTERS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_widened_and_their_gradient_is_of_their_type(dtype: torch.dtype, filters: Any) -> None:
    pred, target = sample(dtype=dtype)
    loss, gradient = step(pred, target, filters=filters)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    wide, wide_gradient = step(pred.detach().float(), target.float(), filters=filters)
    assert torch.equal(loss, wide)
    assert torch.equal(gradient, wide_gradient.to(dtype))


def test_the_wider_of_two_types_is_computed_in() -> None:
    pred, target = sample()
    loss, gradient = step(pred, target.double())
    assert (loss.dtype, gradient.dtype) == (torch.float64, torch.float32)


@FILTERS
def test_autocast_changes_nothing(filters: Any) -> None:
    data = sample()
    expected = step(*data, filters=filters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = step(*data, filters=filters)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@FILTERS
def test_strides_mean_nothing(filters: Any) -> None:
    pred, target = sample()
    expected = step(pred, target, filters=filters)
    views = [
        [one.detach().mT.contiguous().mT for one in (pred, target)],
        [one.detach().movedim(2, -1).contiguous().movedim(-1, 2) for one in (pred, target)],
        [one.detach().transpose(0, 1).contiguous().transpose(0, 1) for one in (pred, target)],
    ]
    for one, other in views:
        assert not one.is_contiguous()
        assert_same(step(one, other, filters=filters), expected, 1e-5)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(("normalize", "chunk_size"), [("joint", None), ("channel", 2)])
def test_a_step_compiles_to_one_graph(normalize: Any, chunk_size: int | None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    criterion = StructureAwareLoss(normalize=normalize, chunk_size=chunk_size)
    pred, target = sample()
    loss = torch.compile(criterion, fullgraph=True, backend=counter)(pred, target)
    (gradient,) = torch.autograd.grad(loss, pred)
    assert counter.frame_count == 1
    knobs: dict[str, Any] = {"normalize": normalize, "filters": "torch"}
    assert_same((loss.detach(), gradient), step(pred, target, **knobs), 1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
def test_batches_of_any_size_share_a_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(structure_aware_loss, fullgraph=True, backend=counter)
    for clips in (3, 5):
        pred, target = sample(clips, 4, 5, 5, 4)
        for one in (pred, target):
            # an error where the code fixes the size
            torch._dynamo.mark_dynamic(one, 0)
        loss = compiled(pred, target)
        (gradient,) = torch.autograd.grad(loss, pred)
        assert_same((loss.detach(), gradient), step(pred, target), 1e-5)
    assert counter.frame_count == 1


# deprecations and hints of the compiler's own modules: nothing a loss can change
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.usefixtures("_fresh_compiler")
def test_the_default_compiler_gives_the_values_of_eager(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # averaged along one axis: each takes the compiler several seconds
    pred, target = sample(1, 2, 8, 6, 2)
    loss = torch.compile(StructureAwareLoss(), fullgraph=True)(pred, target)
    (gradient,) = torch.autograd.grad(loss, pred)
    assert_same((loss.detach(), gradient), step(pred, target, filters="torch"), 1e-5)


@pytest.mark.parametrize("filters", ["torch", "auto"])
def test_fake_tensors_carry_a_step(filters: Any) -> None:
    with FakeTensorMode():
        pred = torch.randn(2, 4, 5, 5, 4, requires_grad=True)
        structure_aware_loss(pred, torch.randn(2, 4, 5, 5, 4), filters=filters, chunk_size=2).backward()
        assert pred.grad is not None
        assert pred.grad.shape == pred.shape


# --- chunks, memory, work ---


@FILTERS
@pytest.mark.parametrize("normalize", ["joint", "channel"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_chunk_size_changes_nothing(dtype: torch.dtype, normalize: Any, filters: Any) -> None:
    data = sample(2, 4, 7, 5, 4, dtype=dtype)
    knobs: dict[str, Any] = {"normalize": normalize, "filters": filters}
    expected = step(*data, chunk_size=None, **knobs)
    for chunk_size in (1, 2, 3, 6, 7, 100):
        loss, gradient = step(*data, chunk_size=chunk_size, **knobs)
        assert_same((loss, gradient), expected, 1e-13 if dtype is torch.float64 else 1e-6)


def measure(channels: int, chunk_size: int | None, *, filters: Any = "torch", backward: bool = True) -> float:
    """The peak of a step beyond its inputs, in volumes of all channels."""
    pred, target = sample(1, 4, channels, 8, 8)
    if not backward:
        pred = pred.detach()
    with Meter([pred, target]) as meter:
        loss = structure_aware_loss(pred, target, filters=filters, chunk_size=chunk_size)
        if backward:
            loss.backward()
    return float(meter.peak / (pred.numel() * 4))


def test_memory_is_that_of_the_gradient_and_of_a_chunk() -> None:
    whole = measure(64, None)
    # the gradient, and in the backward its product with what came in
    assert measure(64, 1) < 2.3
    assert measure(64, 8) < 1 + 2 * whole / 8 + 0.5
    assert whole > 8
    assert measure(64, 8, backward=False) < 2
    # a fixed chunk: what a channel needs falls to that of its gradient
    assert measure(512, 64) < 1 + 2 * whole / 8 + 0.5


def test_kornia_is_held_within_a_chunk_too() -> None:
    whole = measure(32, None, filters="kornia")
    assert whole > 12
    assert measure(32, 1, filters="kornia") < 2.8


@pytest.mark.parametrize("backward", [True, False])
def test_work_is_linear_in_cells(backward: bool) -> None:
    work = []
    for clips in (2, 4, 8):
        pred, target = sample(clips, 4, 4, 8, 8)
        with Meter([pred, target]) as meter:
            loss = structure_aware_loss(pred if backward else pred.detach(), target, filters="torch")
            if backward:
                loss.backward()
        work.append((meter.num_operators, meter.num_elements))
    operators, elements = zip(*work, strict=True)
    assert len(set(operators)) == 1
    assert elements[2] - elements[1] == pytest.approx(2 * (elements[1] - elements[0]), rel=1e-3)


def test_only_the_gradient_waits_for_the_backward() -> None:
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().nbytes() // tensor.itemsize)
        return tensor

    pred, target = sample()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        structure_aware_loss(pred, target, filters="torch")
    assert saved == [pred.numel()] * 2


# --- kornia ---


def test_kornia_is_imported_on_first_use() -> None:
    code = """
import sys
import torch
from ssync_loss.methods.slotcurri.structure import structure_aware_loss
clips = torch.rand(1, 3, 2, 3, 3)
before = "kornia" in sys.modules
structure_aware_loss(clips, clips, filters="torch")
structure_aware_loss(clips[:, :2], clips[:, :2])
structure_aware_loss(clips, clips)
between = "kornia" in sys.modules
structure_aware_loss(clips, clips, filters="kornia")
print(before, between, "kornia" in sys.modules)
"""
    source = str(Path(__file__).parents[1] / "src")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r})\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False", "True"]


@pytest.mark.parametrize(
    ("shape", "knobs", "missing"),
    [
        ((1, 2, 3, 5, 5), {}, "T, H and W of at least 3; got"),
        ((1, 4, 3, 2, 5), {}, "T, H and W of at least 3; got"),
        ((1, 4, 3, 5, 5), {"window": 5}, "T, H and W of at least 5; got"),
        ((1, 4, 3, 5, 5), {"sigma": 1.0}, "sigma=1.5, k1=0.01 and k2=0.03; got"),
        ((1, 4, 3, 5, 5), {"k2": 0.02}, "sigma=1.5, k1=0.01 and k2=0.03; got"),
    ],
)
def test_where_kornia_is_not_exact_it_is_refused_and_left_alone(
    shape: tuple[int, ...], knobs: dict[str, Any], missing: str
) -> None:
    data = sample(*shape)
    with pytest.raises(ValueError, match=f"filters='kornia' needs {missing}"):
        structure_aware_loss(*data, filters="kornia", **knobs)
    actual, expected = (step(*data, filters=one, **knobs) for one in ("auto", "torch"))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_kornia_is_not_asked_in_a_checkpoint() -> None:
    data = sample()
    expected = step(*data, filters="torch")
    loss = checkpoint(structure_aware_loss, *data, use_reentrant=False)
    (gradient,) = torch.autograd.grad(loss, data[0])
    assert_same((loss.detach(), gradient), expected, 0.0)
    with (
        torch.autograd.graph.save_on_cpu(),
        pytest.raises(ValueError, match="filters='kornia' needs no hooks for saved tensors"),
    ):
        structure_aware_loss(*data, filters="kornia")


def test_kornia_is_not_asked_on_other_devices() -> None:
    data = torch.zeros(1, 4, 3, 5, 5, device="meta")
    with pytest.raises(ValueError, match=r"filters='kornia' needs a CPU tensor; got .* on meta"):
        structure_aware_loss(data, data, filters="kornia")
    assert structure_aware_loss(data, data).device.type == "meta"


# --- the module, bad input ---


def test_a_module_remembers_its_settings() -> None:
    data = sample()
    knobs: dict[str, Any] = {
        "window": 1,
        "sigma": 1.0,
        "k1": 0.02,
        "k2": 0.05,
        "eps": 1e-4,
        "normalize": "channel",
        "chunk_size": None,
        "filters": "torch",
    }
    criterion = StructureAwareLoss(**knobs)
    assert torch.equal(criterion(*data), structure_aware_loss(*data, **knobs))
    assert repr(criterion) == (
        "StructureAwareLoss(window=1, sigma=1.0, k1=0.02, k2=0.05, eps=0.0001, normalize='channel', "
        "chunk_size=None, filters='torch')"
    )
    assert not criterion.state_dict()
    for twin in (pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion)):
        assert torch.equal(twin(*data), criterion(*data))
    assert torch.equal(StructureAwareLoss()(*data), structure_aware_loss(*data))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"window": 2}, ValueError, r"`window` must be odd; got 2"),
        ({"window": 0}, ValueError, r"`window` must be at least 1; got 0"),
        ({"window": 3.0}, TypeError, r"`window` must be an integer; got float"),
        ({"sigma": 0.0}, ValueError, r"`sigma` must be finite and above 0.0; got 0.0"),
        ({"k1": -1.0}, ValueError, r"`k1` must be finite and above 0.0; got -1.0"),
        ({"k2": "3"}, TypeError, r"`k2` must be a number; got str"),
        ({"eps": 0}, ValueError, r"`eps` must be finite and above 0.0; got 0"),
        ({"normalize": "clip"}, ValueError, r"`normalize` must be one of 'joint', 'channel'; got 'clip'"),
        ({"chunk_size": 0}, ValueError, r"`chunk_size` must be at least 1; got 0"),
        ({"filters": "cudnn"}, ValueError, r"`filters` must be one of 'auto', 'kornia', 'torch'; got 'cudnn'"),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        structure_aware_loss(*sample(), **wrong)
    with pytest.raises(error, match=message):
        StructureAwareLoss(**wrong)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"pred": None}, TypeError, r"`pred` must be a tensor; got NoneType"),
        ({"pred": torch.zeros(2, 4, 5, 20)}, ValueError, r"`pred` must have shape \(B, T, D, H, W\); got"),
        ({"pred": torch.zeros(2, 4, 5, 5, 4).int()}, TypeError, r"`pred` must be floating point; got torch.int32"),
        ({"pred": torch.zeros(2, 0, 5, 5, 4)}, ValueError, r"`pred` must have T >= 1; got T=0"),
        ({"pred": torch.zeros(2, 4, 0, 5, 4)}, ValueError, r"`pred` must have D >= 1; got D=0"),
        ({"target": [0.0]}, TypeError, r"`target` must be a tensor; got list"),
        ({"target": torch.zeros(2, 4, 5, 4, 5)}, ValueError, r"`target` must have shape \(B=2, T=4, D=5, H=5, W=4\)"),
        ({"target": torch.zeros(2, 4, 5, 5, 4).long()}, TypeError, r"`target` must be floating point; got"),
        ({"target": torch.zeros(2, 4, 5, 5, 4, device="meta")}, ValueError, r"`target` must be on the device of"),
    ],
)
def test_a_wrong_tensor_is_named(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    pred, target = sample()
    with pytest.raises(error, match=message):
        structure_aware_loss(**{"pred": pred, "target": target, **wrong})


# --- the default ---


def test_own_filters_are_the_default_and_as_exact_as_float32() -> None:
    data = [one.detach() for one in sample(2, 6, 7, 6, 8)]
    expected = step(*(one.double() for one in data))
    loss, gradient = step(*data)
    assert (loss - expected[0]).abs() <= 1e-6
    assert (gradient - expected[1]).abs().max() <= 2e-6 * expected[1].abs().max()
    chosen = step(*data, filters="torch")
    assert torch.equal(loss, chosen[0])
    assert torch.equal(gradient, chosen[1])


def test_the_default_is_kept_by_hooks_for_saved_tensors() -> None:
    pred, target = sample(2, 6, 7, 6, 8)
    expected = step(pred, target)
    with torch.autograd.graph.save_on_cpu():
        loss = StructureAwareLoss()(pred, target)
    assert_same((loss.detach(), torch.autograd.grad(loss, pred)[0]), expected, 0.0)
