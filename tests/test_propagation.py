"""Label propagation: the reference, context and window, the read-out, chunks, memory, errors."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from meter import Meter
from ssync_loss.functional import propagate_labels, propagate_masks
from ssync_loss.methods.ino import propagation
from ssync_loss.methods.ino.reference import reference_propagate_labels, reference_propagate_masks
from ssync_loss.metrics import image_miou

NAN, INF = float("nan"), float("inf")


def sample(*shape: int, num_masks: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return features (B, T, D, H, W) that change slowly, and soft masks (B, K, H, W) that sum to 1."""
    clips, frames, channels, height, width = shape or (2, 5, 4, 3, 4)
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(clips, 1, channels, height, width, generator=generator, dtype=torch.float64)
    moving = torch.randn(clips, frames, channels, height, width, generator=generator, dtype=torch.float64)
    masks = torch.randn(clips, num_masks, height, width, generator=generator, dtype=torch.float64).softmax(1)
    return (still + 0.5 * moving).to(dtype), masks.to(dtype)


def a_scene(num_frames: int, *, step: int = 1) -> tuple[Tensor, Tensor]:
    """Return features and labels (1, T, 8, 12) of two moving squares and a background with distinct features."""
    labels = torch.zeros(1, num_frames, 8, 12, dtype=torch.int64)
    for now in range(num_frames):
        labels[0, now, 1:4, now * step : now * step + 3] = 1
        labels[0, now, 4:7, 9 - now * step : 12 - now * step] = 2
    codes = torch.eye(3, dtype=torch.float64)
    noise = torch.randn(1, num_frames, 3, 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return codes[labels].movedim(4, 2) + 0.1 * noise, labels


# --- values ---


@settings(max_examples=40)
@given(
    shape=st.tuples(*(st.sampled_from(sizes) for sizes in ((1, 2), (1, 2, 5), (1, 3), (1, 2), (1, 3)))),
    seed=st.integers(0, 2**31),
    num_context=st.sampled_from((0, 1, 2, 10)),
    radius=st.sampled_from((0, 1, 40)),
    top_k=st.sampled_from((1, 2, 5, 100)),
    temperature=st.sampled_from((0.1, 1.0)),
    chunk_size=st.sampled_from((None, 1, 2, 5)),
    ties=st.booleans(),
    zero=st.booleans(),
)
def test_masks_equal_the_reference(
    shape: tuple[int, ...],
    seed: int,
    num_context: int,
    radius: int,
    top_k: int,
    temperature: float,
    chunk_size: int | None,
    ties: bool,
    zero: bool,
) -> None:
    features, masks = sample(*shape, seed=seed)
    if ties:
        # cosines are multiples of 1/4, so they tie in any precision
        features = torch.zeros(*shape[:2], 4, *shape[3:]).double()
        features += torch.randint(2, features.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    if zero:
        features[0, -1, :, -1, -1] = features[:, 0, :, 0, 0] = 0
    knobs: dict[str, Any] = {"num_context": num_context, "radius": radius, "top_k": top_k, "temperature": temperature}
    actual = propagate_masks(features, masks, chunk_size=chunk_size, **knobs)
    torch.testing.assert_close(actual, reference_propagate_masks(features, masks, **knobs), rtol=1e-10, atol=1e-12)


@settings(max_examples=20)
@given(
    shape=st.tuples(*(st.sampled_from(sizes) for sizes in ((1, 2), (1, 2, 4), (1, 3), (1, 2), (1, 3)))),
    seed=st.integers(0, 2**31),
    top_k=st.sampled_from((1, 2, 100)),
)
def test_labels_equal_the_reference(shape: tuple[int, ...], seed: int, top_k: int) -> None:
    features, _ = sample(*shape, seed=seed)
    labels = torch.randint(4, (shape[0], *shape[3:]), generator=torch.Generator().manual_seed(seed))
    masks = reference_propagate_masks(features, F.one_hot(labels).movedim(3, 1), top_k=top_k)[:, 1:]
    spread = (masks.amax((3, 4)) - masks.amin((3, 4)))[masks.sum((3, 4)) > 0]
    # rounding decides what becomes of a constant mask
    assume((spread > 1e-9).all())
    expected = reference_propagate_labels(features, labels, top_k=top_k)
    assert torch.equal(propagate_labels(features, labels, top_k=top_k), expected)


# --- the context and the window ---


@pytest.mark.parametrize(("num_context", "found"), [(0, False), (2, False), (3, True), (4, True), (9, True)])
def test_a_frame_is_matched_only_while_it_is_in_the_context(num_context: int, found: bool) -> None:
    # two patches and their masks swap in frame 1, and frame 4 is similar only to frame 1
    left, right = [0, 2, 4, 6, 3], [1, 3, 5, 7, 2]
    features = torch.stack([torch.eye(8)[left], torch.eye(8)[right]], 2).view(1, 5, 8, 1, 2)
    # a weak similarity links frame 1 to frame 0
    features[0, 1, 1, 0, 0] = features[0, 1, 0, 0, 1] = 0.5
    masks = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    carried = propagate_masks(features, masks, num_context=num_context, top_k=1)[0, :, 0, 0]
    assert carried[1].tolist() == [0.0, 1.0]
    assert (carried[4].tolist() == [1.0, 0.0]) == found


@pytest.mark.parametrize(("radius", "reached"), [(0, False), (1, False), (2, True), (3, True)])
@pytest.mark.parametrize("axis", [3, 4])
def test_the_radius_limits_the_window(radius: int, reached: bool, axis: int) -> None:
    # one of seven patches differs, and it moves by two
    features = torch.zeros(1, 2, 2, 1, 7)
    features[:, :, 0] = 1
    features[0, 0, :, 0, 2] = features[0, 1, :, 0, 4] = torch.tensor([0.0, 1.0])
    masks = (torch.arange(7) == 2).float().view(1, 1, 1, 7)
    if axis == 3:
        features, masks = features.mT, masks.mT
    carried = propagate_masks(features, masks, radius=radius, top_k=1)[0, 1, 0].flatten()
    assert (carried[4] == 1) == reached


def test_patches_tied_with_the_last_one_count() -> None:
    features = torch.ones(1, 2, 1, 1, 4)
    masks = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    carried = propagate_masks(features, masks, top_k=1)
    assert carried[0, 1].flatten().tolist() == [0.5] * 4


# --- the read-out ---


@pytest.mark.parametrize("normalize", [True, False])
def test_objects_are_tracked(normalize: bool) -> None:
    features, labels = a_scene(7)
    found = propagate_labels(features, labels[:, 0], normalize=normalize)
    assert found.dtype == torch.int64
    assert image_miou(found, labels, background=0).item() > 0.97
    assert torch.equal(found[:, 0], labels[:, 0])
    still = labels[:, :1].expand_as(labels)
    assert image_miou(still, labels, background=0).item() < 0.5


def test_labels_may_be_finer_than_features_and_have_any_ids() -> None:
    features, labels = a_scene(7)
    names = torch.tensor([0, 255, 7])
    fine = names[labels].repeat_interleave(4, 2).repeat_interleave(4, 3)
    found = propagate_labels(features, fine[:, 0].to(torch.uint8))
    assert found.shape == fine.shape
    assert set(found.unique().tolist()) == {0, 7, 255}
    assert image_miou(found, fine, background=0).item() > 0.85
    coarse = propagate_labels(features, fine[:, 0], size=(8, 12))
    assert image_miou(coarse, names[labels], background=0).item() > 0.97


def test_labels_are_resized_by_nearest_centers() -> None:
    labels = torch.arange(6 * 9).view(1, 6, 9)
    seen = propagate_labels(torch.randn(1, 1, 2, 2, 3), labels, size=(2, 3))
    assert seen.tolist() == [[[[10, 13, 16], [37, 40, 43]]]]
    expected = F.interpolate(labels.view(1, 1, 6, 9).float(), size=(4, 5), mode="nearest-exact").long()
    assert torch.equal(propagate_labels(torch.randn(1, 1, 2, 2, 3), labels, size=(4, 5)), expected)


def test_the_read_out_is_bilinear_then_normalized_then_argmax() -> None:
    features, labels = a_scene(5)
    masks = F.one_hot(labels[:, 0], 3).movedim(3, 1).double()
    soft = propagate_masks(features, masks, top_k=20, temperature=1.0)
    for normalize in (True, False):
        pixels = F.interpolate(soft[0], size=(20, 30), mode="bilinear", align_corners=False)
        if normalize:
            low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
            pixels = (pixels - low) / (high - low)
        found = propagate_labels(features, labels[:, 0], size=(20, 30), top_k=20, temperature=1.0, normalize=normalize)
        assert torch.equal(found[0, 1:], pixels.argmax(1)[1:])


def test_a_constant_mask_is_not_normalized() -> None:
    features, labels = a_scene(3)
    found = propagate_labels(features, torch.full((1, 8, 12), 9))
    assert (found == 9).all()
    # object 2 looks like the background from frame 1 on, so its mask is 0
    features, labels = a_scene(3)
    gone = labels == 2
    gone[:, 0] = False
    features += gone.unsqueeze(2) * torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1)
    found = propagate_labels(features, labels[:, 0])
    assert torch.equal(found, labels.masked_fill(gone, 0))


def test_labels_of_other_clips_are_never_assigned() -> None:
    # the clips of a batch have different labels
    features, labels = a_scene(4)
    both = torch.cat([labels[:, 0] + 3, labels[:, 0]])
    found = propagate_labels(features.repeat(2, 1, 1, 1, 1), both)
    assert torch.equal(found[0], found[1] + 3)
    # no center of the grid lies in this pixel
    fine = labels[:, 0].repeat_interleave(3, 1).repeat_interleave(3, 2)
    fine[0, 0, 0] = 8
    found = propagate_labels(features, fine)
    assert found[0, 0, 0, 0] == 8
    assert not (found[:, 1:] == 8).any()


def test_labels_of_other_clips_are_not_assigned_by_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    # only the second clip has label 0; the masks of 1 and 2 are smallest at the same pixel
    masks = torch.zeros(2, 1, 3, 1, 2)
    masks[0, 0, 1:] = torch.tensor([0.5, 0.6])
    masks[1, 0, 0] = 1
    monkeypatch.setattr(propagation, "propagate_masks", lambda *given, **settings: masks.repeat(1, 2, 1, 1, 1))
    found = propagate_labels(torch.ones(2, 2, 1, 1, 2), torch.tensor([[[1, 2]], [[0, 0]]]))
    assert found[0, 1].tolist() == [[1, 1]]


def test_the_read_out_works_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = a_scene(7)
    peaks, results = [], []
    for block in (propagation.BLOCK_ELEMENTS, 2 * 3 * 40 * 60):
        monkeypatch.setattr(propagation, "BLOCK_ELEMENTS", block)
        with Meter() as meter:
            found = propagate_labels(features, labels[:, 0], size=(40, 60))
        peaks.append(meter.peak)
        results.append(found)
    assert torch.equal(results[0], results[1])
    # a block has two frames instead of seven, in float64
    assert peaks[1] < peaks[0] - 2 * 4 * 3 * 40 * 60 * 8


# --- types, memory ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    features, masks = sample(dtype=dtype)
    carried = propagate_masks(features, masks)
    assert carried.dtype == torch.float32
    assert torch.equal(carried, propagate_masks(features.float(), masks.float()))
    assert propagate_masks(features, masks.double()).dtype == torch.float64


def test_autocast_and_gradients_change_nothing() -> None:
    features, masks = sample(dtype=torch.float32)
    expected = propagate_masks(features, masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        carried = propagate_masks(features.requires_grad_(), masks.requires_grad_())
    assert torch.equal(carried, expected)
    assert not carried.requires_grad


def test_strides_do_not_matter() -> None:
    features, masks = sample()
    views = (features.transpose(0, 3).contiguous().transpose(0, 3), masks.mT.contiguous().mT)
    assert not any(one.is_contiguous() for one in views)
    torch.testing.assert_close(propagate_masks(*views), propagate_masks(features, masks))


def test_an_empty_batch_has_empty_results() -> None:
    features, masks = sample(0, 5, 4, 3, 4)
    assert propagate_masks(features, masks).shape == (0, 5, 3, 3, 4)
    assert propagate_labels(features, torch.zeros(0, 6, 8, dtype=torch.int64)).shape == (0, 5, 6, 8)


def peak(frames: int, side: int, chunk_size: int | None, num_context: int = 2) -> int:
    features, masks = sample(1, frames, 3, side, side, num_masks=2, dtype=torch.float32)
    meter = Meter([features, masks])
    with meter:
        propagate_masks(features, masks, num_context=num_context, chunk_size=chunk_size, radius=3)
    return meter.peak


def test_chunks_limit_the_memory() -> None:
    for side in (12, 16):
        places = side**2
        # two maps of scores, and the linear memory of context, result and a frame
        linear = 4 * places * (3 * 5 + 6 * 2 + 8 * 3)
        for chunk_size in (8, 32):
            assert peak(6, side, chunk_size) < linear + 2 * 4 * chunk_size * 3 * places
        assert peak(6, side, places) > linear + 4 * places * 3 * places


def test_only_the_result_grows_with_the_video() -> None:
    result = 4 * 2 * 16**2
    short, long = peak(6, 16, 64), peak(40, 16, 64)
    assert long - short == 34 * result


def test_the_default_limits_the_memory_of_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(propagation, "BLOCK_ELEMENTS", 4 * 3 * 16**2)
    assert peak(6, 16, None) == peak(6, 16, 4)


# --- errors ---


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"num_context": -1}, ValueError, r"`num_context` must be at least 0; got -1"),
        ({"radius": -1}, ValueError, r"`radius` must be at least 0; got -1"),
        ({"top_k": 0}, ValueError, r"`top_k` must be at least 1; got 0"),
        ({"temperature": 0.0}, ValueError, r"`temperature` must be finite and above 0.0; got 0.0"),
        ({"chunk_size": 0}, ValueError, r"`chunk_size` must be at least 1; got 0"),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    features, masks = sample()
    with pytest.raises(error, match=message):
        propagate_masks(features, masks, **wrong)
    with pytest.raises(error, match=message):
        propagate_labels(features, masks.argmax(1), **wrong)


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (4, ValueError, r"`size` must be a pair \(height, width\); got 4"),
        ((4, 5, 6), ValueError, r"`size` must be a pair \(height, width\); got \(4, 5, 6\)"),
        ((0, 4), ValueError, r"`size` must be at least 1; got 0"),
        ((4.0, 4), TypeError, r"`size` must be an integer; got float"),
    ],
)
def test_a_wrong_size_is_named(size: Any, error: type[Exception], message: str) -> None:
    features, masks = sample()
    with pytest.raises(error, match=message):
        propagate_labels(features, masks.argmax(1), size=size)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("features", torch.zeros(2, 0, 4, 3, 4), ValueError, r"`features` must have T >= 1; got T=0"),
        ("features", torch.full((2, 5, 4, 3, 4), NAN), ValueError, r"`features` must hold neither NaN nor infinity"),
        ("features", torch.full((2, 5, 4, 3, 4), INF), ValueError, r"`features` must hold neither NaN nor infinity"),
        ("masks", torch.zeros(2, 3, 3, 5), ValueError, r"`masks` must have shape \(B=2, K, H=3, W=4\); got"),
        ("masks", torch.zeros(2, 0, 3, 4), ValueError, r"`masks` must have K >= 1; got K=0"),
        ("masks", torch.full((2, 3, 3, 4), NAN), ValueError, r"`masks` must hold neither NaN nor infinity; got some"),
        ("labels", torch.zeros(1, 3, 4).long(), ValueError, r"`labels` must have shape \(B=2, h, w\); got \(1, 3, 4\)"),
        ("labels", torch.zeros(2, 0, 4).long(), ValueError, r"`labels` must have h >= 1; got h=0"),
        ("labels", torch.full((2, 3, 4), -1), ValueError, r"`labels` must be at least 0; got -1. Label pixels without"),
    ],
)
def test_a_wrong_tensor_is_named(name: str, value: Any, error: type[Exception], message: str) -> None:
    features, masks = sample()
    given: dict[str, Any] = {"features": features, "masks": masks, "labels": masks.argmax(1), name: value}
    for second, function in (("masks", propagate_masks), ("labels", propagate_labels)):
        if name in ("features", second):
            with pytest.raises(error, match=message):
                function(given["features"], given[second])
