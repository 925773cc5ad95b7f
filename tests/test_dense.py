"""Dense alignment: published numbers, the slow definition, chunks, windows, gradients, memory, bad input."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from golden_neighbors import Golden, golden_names
from ssync_loss import DenseDecoderAlignmentLoss, DenseEncoderAlignmentLoss
from ssync_loss.functional import dense_decoder_alignment_loss, dense_encoder_alignment_loss
from ssync_loss.methods.srl.reference import (
    reference_dense_decoder_alignment_loss,
    reference_dense_encoder_alignment_loss,
)

NAN, INF = float("nan"), float("inf")
Loss = Callable[..., Tensor]

DECODER, ENCODER = dense_decoder_alignment_loss, dense_encoder_alignment_loss
REFERENCE: dict[Loss, Loss] = {
    DECODER: reference_dense_decoder_alignment_loss,
    ENCODER: reference_dense_encoder_alignment_loss,
}
MODULES: dict[Loss, type[torch.nn.Module]] = {DECODER: DenseDecoderAlignmentLoss, ENCODER: DenseEncoderAlignmentLoss}
LABELS = {DECODER: "enc_labels", ENCODER: "dec_labels"}
BOTH = pytest.mark.parametrize("loss_of", [DECODER, ENCODER], ids=["decoder", "encoder"])


class Case(NamedTuple):
    features: Tensor
    anchors: Tensor
    labels: Tensor


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, num_labels: int = 3) -> Case:
    """Return random features, anchors and labels; the shape is (B, T, D, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    clips, frames, channels, height, width = shape or (2, 4, 5, 2, 3)
    size = (clips, frames, channels, height, width)
    features, anchors = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    labels = torch.randint(num_labels, (clips, frames, height, width), generator=generator)
    return Case(features.requires_grad_(), anchors, labels)


def settings_of(loss_of: Loss, **given: Any) -> dict[str, Any]:
    """Return settings that suit small windows; ``top_k`` only where it is known."""
    wanted = {"top_k": 2, **given}
    if "decoder" in loss_of.__name__:
        del wanted["top_k"]
    return wanted


def step(loss_of: Loss, case: Case, **given: Any) -> tuple[Tensor, Tensor]:
    features = case.features.detach().requires_grad_()
    loss = loss_of(features, case.anchors, case.labels, **settings_of(loss_of, **given))
    (gradient,) = torch.autograd.grad(loss, features)
    return loss.detach(), gradient


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tol: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        scale = max(other.abs().max().item(), 1.0) if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=tol, atol=tol * scale)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, dict[str, Any]]:
    """Draw small clips: cosines that tie, duplicates, zero vectors, labels of any name; and settings."""
    clips, frames, height, width = (draw(st.sampled_from(sizes)) for sizes in ((1, 2), (1, 2, 4), (1, 2), (1, 2, 3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    shape = (clips, frames, 4, height, width)
    features = torch.randn(shape, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        # of length 2: cosines are multiples of 1/4, in any precision
        anchors = torch.randint(2, shape, generator=generator).double() * 2 - 1
    else:
        anchors = torch.randn(shape, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        features[0, 0, :, 0, 0] = 0
    if draw(st.booleans()):
        anchors[-1, -1, :, -1, -1] = 0
    if draw(st.booleans()):
        features[..., -1] = features[..., 0]
    names = torch.tensor(draw(st.sampled_from(((0, 1, 2), (-7, 5, 2**40), (4, 4, 4), (0, 10**6, 3)))))
    labels = names[torch.randint(3, (clips, frames, height, width), generator=generator)]
    group = draw(st.sampled_from([None, *(g for g in (1, 2, 4) if frames % g == 0)]))
    return Case(features, anchors, labels), {
        "group_frames": group,
        "top_k": draw(st.integers(1, height * width)),
        # the second needs the largest score taken off
        "temperature": draw(st.sampled_from((0.1, 0.005, 1.0))),
        "base_temperature": draw(st.sampled_from((0.07, 1.0))),
    }


# --- values ---


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", golden_names("dense_"))
def test_published_numbers(name: str, dtype: torch.dtype, chunk_size: int | None) -> None:
    golden = Golden(name)
    shared: dict[str, Any] = {
        "group_frames": golden.count("group_frames"),
        "temperature": golden.number("tau"),
        "base_temperature": golden.number("tau0"),
        "chunk_size": chunk_size,
    }
    anchors = golden.tensor("anchors", dtype).requires_grad_()
    if name.startswith("dense_decoder"):
        source = "reconstruction"
        features = golden.tensor(source, dtype).requires_grad_()
        loss = dense_decoder_alignment_loss(features, anchors, golden.tensor("encoder_labels"), **shared)
    else:
        source = "features"
        features = golden.tensor(source, dtype).requires_grad_()
        shared["top_k"] = golden.count("top_k")
        loss = dense_encoder_alignment_loss(features, anchors, golden.tensor("decoder_labels"), **shared)
    golden.assert_same_step(loss, features, source)
    (unused,) = torch.autograd.grad(loss, anchors, allow_unused=True)
    assert unused is None


def test_all_golden_files_are_here() -> None:
    assert len(golden_names("dense_decoder")) == 2
    assert len(golden_names("dense_encoder")) == 2


@BOTH
@settings(max_examples=60)
@given(case=cases(), chunk_size=st.none() | st.integers(1, 30))
def test_value_and_gradient_are_those_of_the_slow_definition(
    loss_of: Loss, case: tuple[Case, dict[str, Any]], chunk_size: int | None
) -> None:
    data, knobs = case
    actual = step(loss_of, data, chunk_size=chunk_size, **knobs)
    assert_same(actual, step(REFERENCE[loss_of], data, **knobs), 1e-11)


@BOTH
@settings(max_examples=40)
@given(case=cases(), chunk_size=st.integers(1, 50))
def test_a_chunk_size_changes_nothing(loss_of: Loss, case: tuple[Case, dict[str, Any]], chunk_size: int) -> None:
    data, knobs = case
    assert_same(step(loss_of, data, chunk_size=chunk_size, **knobs), step(loss_of, data, **knobs), 1e-12)


@BOTH
@settings(max_examples=30)
@given(case=cases(), names=st.permutations((-3, 8, 2**40, 7, 5, -7, 10**6)))
def test_names_of_labels_mean_nothing(loss_of: Loss, case: tuple[Case, dict[str, Any]], names: list[int]) -> None:
    data, knobs = case
    _, order = data.labels.unique(return_inverse=True)
    renamed = data._replace(labels=torch.tensor(names)[order])
    for actual, expected in zip(step(loss_of, renamed, **knobs), step(loss_of, data, **knobs), strict=True):
        assert torch.equal(actual, expected)


@BOTH
@settings(max_examples=30)
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_the_order_of_the_patches_of_a_window_means_nothing(
    loss_of: Loss, case: tuple[Case, dict[str, Any]], seed: int
) -> None:
    data, knobs = case
    clips, frames, _, height, width = data.features.shape
    group = knobs["group_frames"] or frames
    order = torch.randperm(group * height * width, generator=torch.Generator().manual_seed(seed))

    def shuffled(maps: Tensor) -> Tensor:
        # (clips, windows, patches of a window, channels)
        rows = maps.movedim(2, -1).reshape(clips, frames // group, group * height * width, -1)
        return rows[:, :, order].view(clips, frames, height, width, -1).movedim(-1, 2)

    moved = Case(shuffled(data.features), shuffled(data.anchors), shuffled(data.labels.unsqueeze(2)).squeeze(2))
    loss, gradient = step(loss_of, data, **knobs)
    assert_same(step(loss_of, moved, **knobs), (loss, shuffled(gradient)), 1e-12)


@BOTH
def test_windows_are_apart(loss_of: Loss) -> None:
    data = sample(2, 6, 5, 2, 3, dtype=torch.float64)
    loss, gradient = step(loss_of, data, group_frames=2)
    parts = [
        step(loss_of, Case(*(one.detach()[b : b + 1, t : t + 2] for one in data)), group_frames=None)
        for b in range(2)
        for t in (0, 2, 4)
    ]
    assert_same((loss,), (torch.stack([part[0] for part in parts]).mean(),), 1e-12)
    gradients = torch.stack([part[1] for part in parts]) / 6
    assert_same((gradient,), (gradients.view(2, 3, 2, 5, 2, 3).flatten(1, 2),), 1e-12)


@BOTH
def test_lengths_mean_nothing_and_get_no_gradient(loss_of: Loss) -> None:
    data = sample(dtype=torch.float64)
    stretched = data._replace(features=data.features.detach() * 7, anchors=data.anchors / 3)
    loss, gradient = step(loss_of, data)
    assert_same(step(loss_of, stretched), (loss, gradient / 7), 1e-12)
    assert (gradient * data.features).sum(2).abs().max() < 1e-12 * gradient.abs().max() * data.features.abs().max() * 5
    assert gradient.abs().amin() > 0


def test_decoder_features_like_their_own_anchors_alone_cost_nothing() -> None:
    features = torch.eye(6).view(1, 2, 3, 6).movedim(3, 2).unsqueeze(3)
    labels = torch.arange(6).view(1, 2, 1, 3)
    assert dense_decoder_alignment_loss(features, features, labels, temperature=0.01) == 0
    assert dense_decoder_alignment_loss(features, features, labels, temperature=1.0) > 0.5


def test_encoder_neighbors_are_those_of_the_anchors() -> None:
    # patches 0 and 1 look alike, and 2 and 3; the features pair 0 with 2 and 1 with 3
    alike = torch.tensor([0, 0, 1, 1])
    anchors = torch.eye(2)[alike].T.reshape(1, 1, 2, 1, 4)
    labels = torch.arange(4).view(1, 1, 1, 4)

    def loss_of(pairs: list[int]) -> Tensor:
        features = torch.eye(2)[torch.tensor(pairs)].T.reshape(1, 1, 2, 1, 4)
        return dense_encoder_alignment_loss(features, anchors, labels, group_frames=1, top_k=2)

    assert loss_of([0, 0, 1, 1]) < 0.01
    assert loss_of([0, 1, 0, 1]) > 5


def test_encoder_neighbors_that_tie_with_the_last_one_are_in() -> None:
    # patch 0 sees itself, then two others equally near: with top_k=2 both are its neighbors
    anchors = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [1, -1, 1, -1], [0, 0, 0, 1]]).T.reshape(1, 1, 4, 1, 4)
    data = sample(1, 1, 4, 1, 4, dtype=torch.float64)
    labels = torch.arange(4).view(1, 1, 1, 4)
    knobs: dict[str, Any] = {"group_frames": 1, "temperature": 1.0, "base_temperature": 1.0}
    units = torch.nn.functional.normalize(data.features.detach().view(4, 4).T, dim=1)
    scores = (units @ units.T).fill_diagonal_(-INF).log_softmax(1)
    # cosines with 0: 1, 1/2, 1/2, 0; with 1: 1/2, 1, 0, 1/2; with 2: 1/2, 0, 1, -1/2; with 3: 0, 1/2, -1/2, 1
    neighbors = [[1, 2], [0, 3], [0], [1]]
    expected = -sum(scores[i, near].mean() for i, near in enumerate(neighbors)) / 2 / 4
    actual = dense_encoder_alignment_loss(data.features, anchors, labels, top_k=2, **knobs)
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-12, atol=0)


def test_encoder_anchors_need_not_have_the_channels_of_the_features() -> None:
    data = sample(dtype=torch.float64)
    wide = torch.cat([data.anchors, torch.zeros_like(data.anchors)], 2)
    assert_same(step(ENCODER, data._replace(anchors=wide)), step(ENCODER, data), 1e-12)


# --- empty, single, undefined ---


@BOTH
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_no_clips_are_an_attached_zero(loss_of: Loss, chunk_size: int | None) -> None:
    loss, gradient = step(loss_of, sample(0, 2, 5, 2, 3), chunk_size=chunk_size)
    assert loss.item() == 0
    assert gradient.shape == (0, 2, 5, 2, 3)


@BOTH
@pytest.mark.parametrize("temperature", [0.1, 0.001])
def test_a_window_of_one_patch_is_an_attached_zero(loss_of: Loss, temperature: float) -> None:
    data = sample(2, 3, 5, 1, 1)
    loss, gradient = step(loss_of, data, group_frames=1, top_k=1, temperature=temperature)
    assert loss.abs() < 1e-3 * temperature
    assert gradient.abs().max() < 1e-3
    if loss_of is ENCODER:
        assert loss == 0
        assert not gradient.any()


@BOTH
@pytest.mark.parametrize("group_frames", [1, None])
def test_an_image_is_a_window(loss_of: Loss, group_frames: int | None) -> None:
    data = sample(2, 1, 5, 2, 3)
    actual = step(loss_of, data, group_frames=group_frames)
    assert actual[0] > 0
    assert_same(actual, step(REFERENCE[loss_of], data, group_frames=group_frames), 1e-5)


@BOTH
def test_vectors_without_a_direction_get_no_gradient(loss_of: Loss) -> None:
    data = sample()
    features, anchors = data.features.detach().clone(), data.anchors.clone()
    features[0, 0, :, 0, 0] = 0
    anchors[1, 1, :, 1, 1] = 0
    loss, gradient = step(loss_of, Case(features, anchors, data.labels))
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[0, 0, :, 0, 0].any()
    assert gradient[0, 0, :, 0, 1].any()
    loss, gradient = step(loss_of, Case(features * 0, anchors * 0, data.labels))
    assert loss > 0
    assert not gradient.any()


@BOTH
@pytest.mark.parametrize("dirt", [NAN, INF, -INF])
@pytest.mark.parametrize("dirty", ["features", "anchors"])
def test_dirt_is_never_finite(loss_of: Loss, dirty: str, dirt: float) -> None:
    data = sample()
    spoiled = getattr(data, dirty).detach().clone()
    spoiled[0, 0, 0, 0, 0] = dirt
    assert step(loss_of, data._replace(**{dirty: spoiled}))[0].isnan()


@BOTH
@pytest.mark.parametrize("temperature", [1e-4, 0.024, 0.026, 30.0])
def test_extreme_temperatures_are_finite_and_right(loss_of: Loss, temperature: float) -> None:
    data = sample(1, 2, 5, 2, 3)
    actual = step(loss_of, data, temperature=temperature)
    assert_same(actual, step(REFERENCE[loss_of], data, temperature=temperature), 2e-5)


# --- gradients ---


@BOTH
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_gradcheck(loss_of: Loss, chunk_size: int | None) -> None:
    data = sample(1, 2, 3, 2, 2, dtype=torch.float64)
    knobs = settings_of(loss_of, chunk_size=chunk_size, temperature=0.5)
    assert torch.autograd.gradcheck(
        lambda features: loss_of(features, data.anchors, data.labels, **knobs), (data.features,)
    )


@BOTH
def test_only_features_get_a_gradient(loss_of: Loss) -> None:
    data = sample()
    anchors = data.anchors.requires_grad_()
    loss_of(data.features, anchors, data.labels, **settings_of(loss_of)).backward()
    assert anchors.grad is None
    assert data.features.grad is not None
    assert data.features.grad.any()
    fixed = loss_of(data.features.detach(), anchors, data.labels, **settings_of(loss_of))
    assert not fixed.requires_grad


@BOTH
def test_without_a_gradient_the_value_is_the_same(loss_of: Loss) -> None:
    data = sample()
    loss = loss_of(*data, **settings_of(loss_of))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(loss_of(*data, **settings_of(loss_of)), loss)


@BOTH
def test_the_gradient_follows_what_comes_after_the_loss(loss_of: Loss) -> None:
    data = sample(dtype=torch.float64)
    loss = loss_of(*data, **settings_of(loss_of))
    (once,) = torch.autograd.grad(loss, data.features, retain_graph=True)
    kept = once.clone()
    (again,) = torch.autograd.grad(-3 * loss.square(), data.features)
    torch.testing.assert_close(again, -6 * loss.detach() * once, rtol=1e-12, atol=0)
    assert torch.equal(once, kept)


@BOTH
def test_a_second_derivative_is_refused(loss_of: Loss) -> None:
    data = sample()
    (gradient,) = torch.autograd.grad(loss_of(*data, **settings_of(loss_of)), data.features, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


# --- types, layouts, devices ---


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_widened_and_their_gradient_is_of_their_type(loss_of: Loss, dtype: torch.dtype) -> None:
    data = sample(dtype=dtype)
    loss, gradient = step(loss_of, data)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    wide = Case(data.features.detach().float(), data.anchors.float(), data.labels)
    expected = step(loss_of, wide)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1].to(dtype))


@BOTH
def test_the_wider_of_two_types_is_computed_in(loss_of: Loss) -> None:
    data = sample()
    loss, gradient = step(loss_of, data._replace(anchors=data.anchors.double()))
    assert (loss.dtype, gradient.dtype) == (torch.float64, torch.float32)
    double = Case(data.features.detach().double(), data.anchors.double(), data.labels)
    assert_same((loss, gradient.double()), step(loss_of, double), 1e-6)


@BOTH
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_may_be_of_any_integer_type(loss_of: Loss, dtype: torch.dtype) -> None:
    data = sample()
    expected = step(loss_of, data)
    for actual, wanted in zip(step(loss_of, data._replace(labels=data.labels.to(dtype))), expected, strict=True):
        assert torch.equal(actual, wanted)


@BOTH
def test_autocast_changes_nothing(loss_of: Loss) -> None:
    data = sample()
    expected = step(loss_of, data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = step(loss_of, data)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@BOTH
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_strides_mean_nothing(loss_of: Loss, chunk_size: int | None) -> None:
    data = sample()
    generous = Case(*(one.detach().mT.contiguous().mT for one in data))
    wide = torch.cat([data.features.detach(), data.anchors], 2)
    views = [
        generous,
        data._replace(features=wide[:, :, :5], anchors=wide[:, :, 5:]),
        data._replace(features=data.features.detach().movedim(2, -1).contiguous().movedim(-1, 2)),
        data._replace(features=data.features.detach().transpose(0, 1).contiguous().transpose(0, 1)),
    ]
    expected = step(loss_of, data, chunk_size=chunk_size)
    for view in views:
        assert any(not one.is_contiguous() for one in view)
        assert_same(step(loss_of, view, chunk_size=chunk_size), expected, 1e-6)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@BOTH
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_a_step_compiles_to_one_graph(loss_of: Loss, chunk_size: int | None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    criterion = MODULES[loss_of](**settings_of(loss_of, chunk_size=chunk_size))
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    data = sample(1, 2, 5, 2, 3)
    loss = compiled(*data)
    (gradient,) = torch.autograd.grad(loss, data.features)
    assert counter.frame_count == 1
    assert_same((loss.detach(), gradient), step(loss_of, data, chunk_size=chunk_size), 1e-6)


@pytest.mark.usefixtures("_fresh_compiler")
@BOTH
def test_batches_of_any_size_share_a_graph(loss_of: Loss) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of, fullgraph=True, backend=counter)
    for clips in (3, 5):
        data = sample(clips, 4, 5, 2, 3)
        for one in data:
            # an error where the code fixes the size
            torch._dynamo.mark_dynamic(one, 0)
        loss = compiled(*data, **settings_of(loss_of))
        (gradient,) = torch.autograd.grad(loss, data.features)
        assert_same((loss.detach(), gradient), step(loss_of, data), 1e-6)
    assert counter.frame_count == 1


# deprecations and hints of the compiler's own modules: nothing a loss can change
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.usefixtures("_fresh_compiler")
def test_the_default_compiler_gives_the_values_of_eager(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # whole tiles of vectors, and parts of tiles
    data = sample(2, 4, 16, 6, 6)
    loss = torch.compile(DenseDecoderAlignmentLoss(), fullgraph=True)(*data)
    (gradient,) = torch.autograd.grad(loss, data.features)
    expected = step(DECODER, data)
    assert_same((loss.detach(),), expected[:1], 1e-6)
    torch.testing.assert_close(gradient, expected[1], rtol=0, atol=1e-5 * expected[1].abs().max().item())


@BOTH
@pytest.mark.parametrize("chunk_size", [None, 5, 20])
def test_fake_tensors_carry_a_step(loss_of: Loss, chunk_size: int | None) -> None:
    with FakeTensorMode():
        features = torch.randn(2, 4, 5, 2, 3, requires_grad=True)
        labels = torch.zeros(2, 4, 2, 3, dtype=torch.int64)
        loss = loss_of(features, torch.randn(2, 4, 5, 2, 3), labels, **settings_of(loss_of, chunk_size=chunk_size))
        loss.backward()
        assert loss.shape == ()
        assert features.grad is not None
        assert features.grad.shape == features.shape


# --- memory and work ---


class Operators(TorchDispatchMode):
    """Counts operators and keeps the size of the largest storage that any of them touched."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.number += 1
        sizes = [one.untyped_storage().nbytes() // one.itemsize for one in tree_leaves(out) if isinstance(one, Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


def cost(loss_of: Loss, clips: int, side: int, chunk_size: int | None) -> Operators:
    data = sample(clips, 2, 3, side, side)
    operators = Operators()
    with operators:
        step(loss_of, data, chunk_size=chunk_size)
    return operators


@BOTH
def test_a_chunk_is_all_that_is_held(loss_of: Loss) -> None:
    # (clips, side): patches of a window are 2 * side^2
    for clips, side, chunk_size in ((1, 6, 10), (4, 6, 10), (1, 12, 10), (4, 6, 150), (4, 6, 10**6)):
        patches = 2 * side**2
        held = min(chunk_size // patches, clips) * patches if chunk_size >= patches else chunk_size
        # or the features of all windows
        assert cost(loss_of, clips, side, chunk_size).largest == max(held * patches, clips * patches * 3)
    assert cost(loss_of, 4, 6, None).largest == 4 * 72**2


@BOTH
def test_clips_and_frames_are_not_walked_through(loss_of: Loss) -> None:
    numbers = {cost(loss_of, clips, 2, None).number for clips in (1, 2, 9)}
    assert len(numbers) == 1
    assert cost(loss_of, 9, 2, 9 * 8).number == numbers.pop()


@BOTH
def test_nothing_quadratic_waits_for_the_backward(loss_of: Loss) -> None:
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().nbytes() // tensor.itemsize)
        return tensor

    data = sample(1, 2, 3, 6, 6)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(*data, **settings_of(loss_of))
    # the features, which are there anyhow, and their gradient
    assert saved == [data.features.numel()] * 2


# --- modules ---


@BOTH
def test_a_module_remembers_its_settings(loss_of: Loss) -> None:
    data = sample()
    knobs = settings_of(loss_of, group_frames=4, top_k=3, temperature=0.2, base_temperature=0.1, chunk_size=7)
    criterion = MODULES[loss_of](**knobs)
    assert torch.equal(criterion(*data), loss_of(*data, **knobs))
    assert (
        repr(criterion) == f"{type(criterion).__name__}({', '.join(f'{k}={v!r}' for k, v in in_order(loss_of, knobs))})"
    )
    assert not criterion.state_dict()
    for twin in (pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion)):
        assert torch.equal(twin(*data), criterion(*data))
        assert repr(twin) == repr(criterion)
    default = settings_of(loss_of, group_frames=2, top_k=8)
    large = sample(1, 2, 4, 3, 3)
    assert torch.equal(MODULES[loss_of]()(*large), loss_of(*large, **default))


def in_order(loss_of: Loss, knobs: dict[str, Any]) -> list[tuple[str, Any]]:
    names = ["group_frames", "top_k", "temperature", "base_temperature", "chunk_size"]
    return [(name, knobs[name]) for name in names if name in knobs]


# --- bad input ---


@BOTH
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"group_frames": 0}, ValueError, r"`group_frames` must be at least 1; got 0"),
        ({"group_frames": 2.0}, TypeError, r"`group_frames` must be an integer; got float"),
        ({"group_frames": True}, TypeError, r"`group_frames` must be an integer; got bool"),
        ({"top_k": 0}, ValueError, r"`top_k` must be at least 1; got 0"),
        ({"top_k": 1.5}, TypeError, r"`top_k` must be an integer; got float"),
        ({"temperature": 0.0}, ValueError, r"`temperature` must be finite and above 0.0; got 0.0"),
        ({"temperature": INF}, ValueError, r"`temperature` must be finite and above 0.0; got inf"),
        ({"temperature": torch.ones(())}, TypeError, r"`temperature` must be a number; got Tensor"),
        ({"base_temperature": -1.0}, ValueError, r"`base_temperature` must be finite and above 0.0; got -1.0"),
        ({"chunk_size": 0}, ValueError, r"`chunk_size` must be at least 1; got 0"),
        ({"chunk_size": "256"}, TypeError, r"`chunk_size` must be an integer; got str"),
    ],
)
def test_a_wrong_setting_is_named(loss_of: Loss, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    if loss_of is DECODER and "top_k" in wrong:
        with pytest.raises(TypeError, match="unexpected keyword argument 'top_k'"):
            loss_of(*sample(), **wrong)
        return
    with pytest.raises(error, match=message):
        loss_of(*sample(), **wrong)
    with pytest.raises(error, match=message):
        MODULES[loss_of](**wrong)


@BOTH
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"features": None}, TypeError, r"`features` must be a tensor; got NoneType"),
        ({"features": torch.zeros(2, 4, 5, 6)}, ValueError, r"`features` must have shape \(B, T, D, H, W\); got"),
        ({"features": torch.zeros(2, 4, 5, 2, 3).long()}, TypeError, r"`features` must be floating point; got"),
        ({"features": torch.zeros(2, 4, 0, 2, 3)}, ValueError, r"`features` must have D >= 1; got D=0"),
        ({"features": torch.zeros(2, 4, 5, 0, 3)}, ValueError, r"`features` must have H >= 1; got H=0"),
        ({"features": torch.zeros(2, 0, 5, 2, 3)}, ValueError, r"`features` must have T >= 1; got T=0"),
        ({"anchors": [1.0]}, TypeError, r"`anchors` must be a tensor; got list"),
        ({"anchors": torch.zeros(2, 4, 5, 2, 4)}, ValueError, r"`anchors` must have shape .*W=3\); got"),
        ({"anchors": torch.zeros(2, 4, 5, 2, 3).int()}, TypeError, r"`anchors` must be floating point; got"),
        ({"anchors": torch.zeros(2, 4, 5, 2, 3, device="meta")}, ValueError, r"`anchors` must be on the device of"),
        ({"labels": torch.zeros(2, 4, 2, 2).long()}, ValueError, r"`LABELS` must have shape \(B=2, T=4, H=2, W=3\)"),
        ({"labels": torch.zeros(2, 4, 2, 3)}, TypeError, r"`LABELS` must hold integers; got torch.float32"),
        ({"labels": torch.zeros(2, 4, 2, 3).bool()}, TypeError, r"`LABELS` must hold integers; got torch.bool"),
        ({"labels": torch.zeros(2, 4, 2, 3, device="meta").long()}, ValueError, r"`LABELS` must be on the device of"),
    ],
)
def test_a_wrong_tensor_is_named(loss_of: Loss, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("LABELS", LABELS[loss_of])):
        loss_of(*sample()._replace(**wrong), **settings_of(loss_of))


def test_decoder_features_and_anchors_have_the_same_channels() -> None:
    data = sample()
    with pytest.raises(ValueError, match=r"`anchors` must have shape \(B=2, T=4, D=5, H=2, W=3\); got"):
        dense_decoder_alignment_loss(*data._replace(anchors=data.anchors[:, :, :4]))


@BOTH
@pytest.mark.parametrize(("frames", "group_frames"), [(1, 2), (3, 2), (4, 3), (2, 4)])
def test_windows_that_do_not_divide_a_clip_are_named(loss_of: Loss, frames: int, group_frames: int) -> None:
    message = rf"`group_frames` must divide the frames of a clip, T={frames}; got {group_frames}\. group_frames=None"
    with pytest.raises(ValueError, match=message):
        loss_of(*sample(2, frames, 5, 2, 3), **settings_of(loss_of, group_frames=group_frames))


def test_more_neighbors_than_patches_are_named() -> None:
    data = sample(2, 4, 5, 2, 3)
    assert dense_encoder_alignment_loss(*data, top_k=6) > 0
    with pytest.raises(ValueError, match=r"`top_k` must be at most 6, .* got 7, which asks for 14 .* the 12 patches"):
        dense_encoder_alignment_loss(*data, top_k=7)
    with pytest.raises(ValueError, match=r"`top_k` must be at most 6, .* got 8, which asks for 32 .* the 24 patches"):
        dense_encoder_alignment_loss(*data, group_frames=None)


# --- features that are nearly equal ---


def by_autograd(features: Tensor, anchors: Tensor, labels: Tensor, num_neighbors: int) -> Tensor:
    """The encoder's loss of one window in the public formulation, whose gradient autograd finds."""
    x, y = (torch.nn.functional.normalize(one.transpose(1, 2).flatten(2).mT, dim=2) for one in (features, anchors))
    names = labels.flatten(1)
    others = ~torch.eye(names.shape[1], dtype=torch.bool)
    scores = x @ x.mT / 0.1
    scores = scores - scores.amax(2, keepdim=True).detach()
    log_probs = scores - (scores.exp() * others).sum(2, keepdim=True).log()
    cosines = y @ y.mT
    near = (cosines >= cosines.topk(num_neighbors, 2).values[..., -1:]) & others
    alike = (names.unsqueeze(1) == names.unsqueeze(2)) & others
    means = [(chosen * log_probs).sum(2) / chosen.sum(2).clamp_min(1) for chosen in (near, alike)]
    return -(means[0] + means[1]).mean() / 2 * (0.1 / 0.07)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_of_features_that_are_nearly_equal_gradients_lose_less_than_those_of_autograd(spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, 1, 32, 1, 1, generator=generator)
    features = features + spread * torch.randn(2, 2, 32, 5, 6, generator=generator)
    anchors, labels = (
        torch.randn(2, 2, 8, 5, 6, generator=generator),
        torch.randint(4, (2, 2, 5, 6), generator=generator),
    )

    def slope(function: Callable[..., Tensor], dtype: torch.dtype, knob: dict[str, Any]) -> Tensor:
        one = features.to(dtype).requires_grad_()
        return torch.autograd.grad(function(one, anchors.to(dtype), labels, **knob), one)[0]

    public = {"num_neighbors": 16}
    exact = slope(by_autograd, torch.float64, public)
    torch.testing.assert_close(slope(ENCODER, torch.float64, {}), exact, rtol=0, atol=1e-8 * exact.abs().max().item())
    ours, theirs = (
        ((one - exact).norm() / exact.norm()).item()
        for one in (slope(ENCODER, torch.float32, {}), slope(by_autograd, torch.float32, public))
    )
    assert ours < 0.5 * theirs
    assert ours < 3e-7 / spread
