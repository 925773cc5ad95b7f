"""Dense alignment: published values, the reference, chunks, windows, gradients, memory, errors."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contract import INF, Case, LossContract
from golden_neighbors import Golden, golden_names
from ssync_loss import DenseDecoderAlignmentLoss, DenseEncoderAlignmentLoss
from ssync_loss.functional import dense_decoder_alignment_loss, dense_encoder_alignment_loss
from ssync_loss.methods.srl.reference import (
    reference_dense_decoder_alignment_loss,
    reference_dense_encoder_alignment_loss,
)
from steps import assert_same, saved_elements, step_of

Loss = Callable[..., Tensor]

DECODER, ENCODER = dense_decoder_alignment_loss, dense_encoder_alignment_loss
REFERENCE: dict[Loss, Loss] = {
    DECODER: reference_dense_decoder_alignment_loss,
    ENCODER: reference_dense_encoder_alignment_loss,
}
BOTH = pytest.mark.parametrize("loss_of", [DECODER, ENCODER], ids=["decoder", "encoder"])


class Scene(NamedTuple):
    features: Tensor
    anchors: Tensor
    labels: Tensor


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, num_labels: int = 3) -> Scene:
    """Return random features, anchors and labels for the shape (B, T, D, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    clips, frames, channels, height, width = shape or (2, 4, 5, 2, 3)
    size = (clips, frames, channels, height, width)
    features, anchors = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    labels = torch.randint(num_labels, (clips, frames, height, width), generator=generator)
    return Scene(features.requires_grad_(), anchors, labels)


def settings_of(loss_of: Loss, **given: Any) -> dict[str, Any]:
    """Return settings for small windows. Only the encoder has ``top_k``."""
    wanted = {"top_k": 2, **given}
    if "decoder" in loss_of.__name__:
        del wanted["top_k"]
    return wanted


def step(loss_of: Loss, case: Scene, **given: Any) -> tuple[Tensor, Tensor]:
    return step_of(loss_of, *case, **settings_of(loss_of, **given))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Scene, dict[str, Any]]:
    """Draw small clips with tied cosines, duplicates, zero vectors and any labels, and draw settings."""
    clips, frames, height, width = (draw(st.sampled_from(sizes)) for sizes in ((1, 2), (1, 2, 4), (1, 2), (1, 2, 3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    shape = (clips, frames, 4, height, width)
    features = torch.randn(shape, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        # anchors have norm 2, so that cosines are multiples of 1/4 in any precision
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
    return Scene(features, anchors, labels), {
        "group_frames": group,
        "top_k": draw(st.integers(1, height * width)),
        # at 0.005 the code subtracts the largest score
        "temperature": draw(st.sampled_from((0.1, 0.005, 1.0))),
        "base_temperature": draw(st.sampled_from((0.07, 1.0))),
    }


# --- values ---


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", golden_names("dense_", 4))
def test_published_numbers(name: str, dtype: torch.dtype, chunk_size: int | None) -> None:
    golden = Golden(name)
    shared: dict[str, Any] = {
        "group_frames": golden.count("group_frames"),
        "temperature": golden.number("tau"),
        "base_temperature": golden.number("tau0"),
        "chunk_size": chunk_size,
    }
    anchors = golden.tensor("anchors", dtype).requires_grad_()
    loss_of: Loss = DECODER
    source, labels = "reconstruction", "encoder_labels"
    if name.startswith("dense_encoder"):
        loss_of, source, labels = ENCODER, "features", "decoder_labels"
        shared["top_k"] = golden.count("top_k")
    features = golden.tensor(source, dtype).requires_grad_()
    loss = loss_of(features, anchors, golden.tensor(labels), **shared)
    golden.assert_same_step(loss, features, source)
    (unused,) = torch.autograd.grad(loss, anchors, allow_unused=True)
    assert unused is None


@BOTH
@settings(max_examples=60)
@given(case=cases(), chunk_size=st.none() | st.integers(1, 30))
def test_value_and_gradient_equal_the_reference(
    loss_of: Loss, case: tuple[Scene, dict[str, Any]], chunk_size: int | None
) -> None:
    data, knobs = case
    actual = step(loss_of, data, chunk_size=chunk_size, **knobs)
    assert_same(actual, step(REFERENCE[loss_of], data, **knobs), 1e-11)


def test_the_decoder_loss_of_features_equal_to_distinct_anchors_is_zero() -> None:
    features = torch.eye(6).view(1, 2, 3, 6).movedim(3, 2).unsqueeze(3)
    labels = torch.arange(6).view(1, 2, 1, 3)
    assert dense_decoder_alignment_loss(features, features, labels, temperature=0.01) == 0
    assert dense_decoder_alignment_loss(features, features, labels, temperature=1.0) > 0.5


def test_anchors_determine_the_neighbors_of_the_encoder() -> None:
    # anchors pair patches 0 and 1, and patches 2 and 3
    alike = torch.tensor([0, 0, 1, 1])
    anchors = torch.eye(2)[alike].T.reshape(1, 1, 2, 1, 4)
    labels = torch.arange(4).view(1, 1, 1, 4)

    def loss_of(pairs: list[int]) -> Tensor:
        features = torch.eye(2)[torch.tensor(pairs)].T.reshape(1, 1, 2, 1, 4)
        return dense_encoder_alignment_loss(features, anchors, labels, group_frames=1, top_k=2)

    assert loss_of([0, 0, 1, 1]) < 0.01
    assert loss_of([0, 1, 0, 1]) > 5


def test_neighbors_tied_with_the_last_one_count() -> None:
    # patch 0 is nearest to itself, then to two tied patches; with top_k=2 both are neighbors
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


def test_encoder_anchors_may_have_other_channels() -> None:
    data = sample(dtype=torch.float64)
    wide = torch.cat([data.anchors, torch.zeros_like(data.anchors)], 2)
    assert_same(step(ENCODER, data._replace(anchors=wide)), step(ENCODER, data), 1e-12)


@BOTH
@pytest.mark.parametrize("temperature", [1e-4, 0.024, 0.026, 30.0])
def test_extreme_temperatures(loss_of: Loss, temperature: float) -> None:
    data = sample(1, 2, 5, 2, 3)
    actual = step(loss_of, data, temperature=temperature)
    assert_same(actual, step(REFERENCE[loss_of], data, temperature=temperature), 2e-5)


# --- memory and work ---


class Operators(TorchDispatchMode):
    """Counts operators, and records the number of elements of the largest storage."""

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
def test_the_largest_tensor_is_the_map_of_a_chunk(loss_of: Loss) -> None:
    # a window has 2 * side^2 patches
    for clips, side, chunk_size in ((1, 6, 10), (4, 6, 10), (1, 12, 10), (4, 6, 150), (4, 6, 10**6)):
        patches = 2 * side**2
        held = min(chunk_size // patches, clips) * patches if chunk_size >= patches else chunk_size
        # the features of all windows may be larger
        assert cost(loss_of, clips, side, chunk_size).largest == max(held * patches, clips * patches * 3)
    assert cost(loss_of, 4, 6, None).largest == 4 * 72**2


@BOTH
def test_there_is_no_loop_over_clips_and_frames(loss_of: Loss) -> None:
    numbers = {cost(loss_of, clips, 2, None).number for clips in (1, 2, 9)}
    assert len(numbers) == 1
    # torch 2.6 has fewer operators for a full slice
    assert cost(loss_of, 9, 2, 9 * 8).number <= numbers.pop()


@BOTH
def test_nothing_quadratic_is_saved_for_backward(loss_of: Loss) -> None:
    data = sample(1, 2, 3, 6, 6)
    # only the features and their gradient
    assert saved_elements(loss_of, *data, **settings_of(loss_of)) == [data.features.numel()] * 2


# --- errors ---


def test_decoder_anchors_must_have_the_channels_of_the_features() -> None:
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


# --- nearly equal features ---


def by_autograd(features: Tensor, anchors: Tensor, labels: Tensor, num_neighbors: int) -> Tensor:
    """Compute the encoder loss of one window in the published formulation, for autograd."""
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
def test_gradients_of_nearly_equal_features_are_more_exact_than_autograd(spread: float, seed: int) -> None:
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


@pytest.mark.parametrize("offset", [10, 100, 1000])
def test_a_common_offset_costs_no_digits_of_the_gradient(offset: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shared = offset * torch.randn(2, 1, 1, 16, 1, 1, generator=generator)
    features, anchors = torch.randn(2, 2, 4, 16, 6, 6, generator=generator) + shared
    labels = torch.randint(4, (2, 4, 6, 6), generator=generator)
    (_, exact), (_, actual) = (
        step_of(DECODER, features.to(dtype), anchors.to(dtype), labels) for dtype in (torch.float64, torch.float32)
    )
    assert (actual - exact).abs().max() < 2.5e-7 * offset * exact.abs().max()


# --- the contract of every loss ---


def refusals(labels: str) -> list[tuple[dict[str, Any], type[Exception], str]]:
    """Return the refusals of both losses, whose labels have different names."""
    return [
        ({"group_frames": 0}, ValueError, r"`group_frames` must be at least 1; got 0"),
        ({"temperature": 0.0}, ValueError, r"`temperature` must be finite and above 0.0; got 0.0"),
        ({"temperature": INF}, ValueError, r"`temperature` must be finite and above 0.0; got inf"),
        ({"base_temperature": -1.0}, ValueError, r"`base_temperature` must be finite and above 0.0; got -1.0"),
        ({"chunk_size": 0}, ValueError, r"`chunk_size` must be at least 1; got 0"),
        ({"chunk_size": "256"}, TypeError, r"`chunk_size` must be an integer; got str"),
        ({"features": torch.zeros(2, 4, 0, 2, 3)}, ValueError, r"`features` must have D >= 1; got D=0"),
        ({"features": torch.zeros(2, 4, 5, 0, 3)}, ValueError, r"`features` must have H >= 1; got H=0"),
        ({"features": torch.zeros(2, 0, 5, 2, 3)}, ValueError, r"`features` must have T >= 1; got T=0"),
        ({"anchors": torch.zeros(2, 4, 5, 2, 4)}, ValueError, r"`anchors` must have shape .*W=3\); got"),
        ({labels: torch.zeros(2, 4, 2, 2).long()}, ValueError, rf"`{labels}` must have shape \(B=2, T=4, H=2, W=3\)"),
    ]


class DenseContract(LossContract):
    settings: ClassVar = {"group_frames": 4, "temperature": 0.2, "base_temperature": 0.1}
    inert: ClassVar = {"chunk_size": 7}
    not_applicable: ClassVar = {"poison": "every patch counts"}
    labels: ClassVar[str]

    def case(self, *shape: int) -> Case:
        scene = sample(*shape)
        return Case(self.make(), {"features": scene.features}, {"anchors": scene.anchors, self.labels: scene.labels})

    def large_case(self) -> Case:
        return self.case(2, 4, 16, 6, 6)


class TestDecoder(DenseContract):
    loss = DenseDecoderAlignmentLoss
    function = staticmethod(dense_decoder_alignment_loss)
    refused: ClassVar = refusals("enc_labels")
    labels = "enc_labels"


class TestDecoderInChunks(TestDecoder):
    knobs: ClassVar = {"chunk_size": 7}
    inert: ClassVar = {"chunk_size": None}
    one_size = "the loop over chunks is unrolled"
    not_applicable: ClassVar = DenseContract.not_applicable | {"default_compiler": "it is slow with an unrolled loop"}


class TestEncoder(DenseContract):
    loss = DenseEncoderAlignmentLoss
    function = staticmethod(dense_encoder_alignment_loss)
    knobs: ClassVar = {"top_k": 2}
    settings: ClassVar = DenseContract.settings | {"top_k": 3}
    refused: ClassVar = [
        ({"top_k": 0}, ValueError, r"`top_k` must be at least 1; got 0"),
        *refusals("dec_labels"),
    ]
    labels = "dec_labels"


class TestEncoderInChunks(TestEncoder):
    knobs: ClassVar = {"top_k": 2, "chunk_size": 7}
    inert: ClassVar = {"chunk_size": None}
    one_size = "the loop over chunks is unrolled"
    not_applicable: ClassVar = TestDecoderInChunks.not_applicable
