"""J and F against loops over pixels, dilation by full disks, and values computed by hand."""

import itertools
import math
import sys
from collections.abc import Callable
from statistics import fmean
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from torch import Tensor

from refusals import refuses
from ssync_loss.metrics import MetricAverage, contour_accuracy, j_and_f, jf, region_similarity
from ssync_loss.metrics._contours import contours, within

VOID = -1
TARGET_IDS = [VOID, 0, 1, 2, 9, 2**40]
PRED_IDS = [0, 1, 2, 9, 2**40, -7, 2**62]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

measures = [region_similarity, contour_accuracy, j_and_f]


@st.composite
def clips(draw: st.DrawFn, frames: int = 3) -> tuple[Tensor, Tensor]:
    """Draw a ground truth and a prediction that is right at some pixels."""
    shape = draw(st.tuples(st.integers(1, 2), st.integers(1, frames), st.integers(1, 4), st.integers(1, 5)))
    target_ids = draw(st.lists(st.sampled_from(TARGET_IDS), min_size=1, max_size=4))
    pred_ids = draw(st.lists(st.sampled_from(PRED_IDS), min_size=1, max_size=4))
    target = draw(hnp.arrays(np.int64, shape, elements=st.sampled_from(target_ids), fill=st.nothing()))
    other = draw(hnp.arrays(np.int64, shape, elements=st.sampled_from(pred_ids), fill=st.nothing()))
    wrong = draw(hnp.arrays(np.bool_, shape))
    return torch.from_numpy(np.where(wrong, other, target)), torch.from_numpy(target)


backgrounds = st.sampled_from([None, 0, 9])
tolerances = st.sampled_from([0, 0.008, 0.2, 0.3, 1.0])


def at_most(clip: tuple[Tensor, Tensor], skip_first: int, skip_last: int) -> tuple[int, int]:
    """Limit the skipped frames so that one remains."""
    rest = clip[0].shape[1] - 1
    return min(skip_first, rest), min(skip_last, rest - min(skip_first, rest))


# --- the slow reference: a loop over pixels ---


class Measured(NamedTuple):
    j: float
    f: float


def reference_j(slot: Mask, obj: Mask) -> float:
    pairs = list(zip(slot.flatten().tolist(), obj.flatten().tolist(), strict=True))
    union = sum(a or b for a, b in pairs)
    return sum(a and b for a, b in pairs) / union if union else 1.0


def reference_contour(mask: Mask) -> Mask:
    height, width = mask.shape
    contour = np.zeros_like(mask)
    for y, x in itertools.product(range(height), range(width)):
        beyond = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
        contour[y, x] = any(mask[y, x] != mask[p] for p in beyond if p[0] < height and p[1] < width)
    return contour


def disk(radius: int) -> Mask:
    offsets = np.arange(-radius, radius + 1)
    return cast("Mask", offsets[:, None] ** 2 + offsets[None, :] ** 2 <= radius**2)


def reference_f(slot: Mask, obj: Mask, tolerance: float) -> float:
    structure = disk(math.ceil(tolerance * math.sqrt(slot.shape[0] ** 2 + slot.shape[1] ** 2)))
    of_slot, of_object = reference_contour(slot), reference_contour(obj)
    if not of_slot.any() and not of_object.any():
        return 1.0
    if not of_slot.any() or not of_object.any():
        return 0.0
    precision = (of_slot & ndimage.binary_dilation(of_object, structure)).sum() / of_slot.sum()
    recall = (of_object & ndimage.binary_dilation(of_slot, structure)).sum() / of_object.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def reference_video(
    pred: Tensor,
    target: Tensor,
    *,
    background: int | None,
    matching: str,
    tolerance: float,
    skip_first: int = 0,
    skip_last: int = 0,
) -> list[list[Measured]]:
    """Return J and F of every object of a video, for every matching with the best J&F."""
    objects = sorted({one for one in target.flatten().tolist() if one >= 0} - {background})
    frames = [
        (slots.numpy(), truth.numpy())
        for slots, truth in list(zip(pred, target, strict=True))[skip_first : len(pred) - skip_last]
        if bool((truth >= 0).any())
    ]
    if not frames:
        return [[]]
    slots: list[Any] = objects
    if matching == "hungarian":
        slots = sorted({one for labels, truth in frames for one in labels[truth >= 0].tolist()})
        slots += [None] * (len(objects) - len(slots))

    def measure(obj: int, slot: int | None) -> Measured:
        pairs = [((labels == slot) & (truth >= 0), truth == obj) for labels, truth in frames]
        return Measured(
            fmean(reference_j(*pair) for pair in pairs), fmean(reference_f(*pair, tolerance) for pair in pairs)
        )

    if matching == "ids":
        return [[measure(one, one) for one in objects]]
    table = {(obj, i): measure(obj, slot) for obj in objects for i, slot in enumerate(slots)}
    ways = [
        [table[pair] for pair in zip(objects, way, strict=True)]
        for way in itertools.permutations(range(len(slots)), len(objects))
    ]
    best = max(sum(one.j + one.f for one in way) for way in ways)
    return [way for way in ways if sum(one.j + one.f for one in way) > best - 1e-9]


def assert_scores(actual: Tensor, expected: list[float]) -> None:
    assert actual.dtype == torch.float64
    assert actual.tolist() == pytest.approx(expected, rel=0, abs=1e-12)


def frames(*rows: list[int]) -> Tensor:
    """Build one video of one-row frames."""
    return torch.tensor(rows).unsqueeze(1).unsqueeze(0)


def square(side: int, *corners: tuple[int, int], size: int = 20) -> Tensor:
    """Build a video of one square, given by its upper left corner in each frame."""
    video = torch.zeros(1, len(corners), size, size, dtype=torch.int64)
    for frame, (y, x) in zip(video[0], corners, strict=True):
        frame[y : y + side, x : x + side] = 1
    return video


class TestAgainstTheReference:
    @given(clips(), backgrounds, tolerances, st.integers(0, 2), st.integers(0, 1))
    @settings(max_examples=200, deadline=None)
    def test_equal_ids(
        self, clip: tuple[Tensor, Tensor], background: int | None, tolerance: float, first: int, last: int
    ) -> None:
        skip_first, skip_last = at_most(clip, first, last)
        options: dict[str, Any] = {"background": background, "tolerance": tolerance}
        options |= {"skip_first": skip_first, "skip_last": skip_last}
        videos = [reference_video(*video, matching="ids", **options)[0] for video in zip(*clip, strict=True)]
        assert_scores(region_similarity(*clip, **options), [mean_of(one.j for one in video) for video in videos])
        assert_scores(contour_accuracy(*clip, **options), [mean_of(one.f for one in video) for video in videos])
        assert_scores(j_and_f(*clip, **options), [mean_of((one.j + one.f) / 2 for one in video) for video in videos])

    @given(clips(), backgrounds, tolerances, st.integers(0, 1))
    @settings(max_examples=150, deadline=None)
    def test_matched_slots_equal_the_best_of_all_permutations(
        self, clip: tuple[Tensor, Tensor], background: int | None, tolerance: float, first: int
    ) -> None:
        skip_first, _ = at_most(clip, first, 0)
        options: dict[str, Any] = {"background": background, "tolerance": tolerance, "skip_first": skip_first}
        options["matching"] = "hungarian"
        # several matchings may be equally good, and J and F belong to one of them
        for i, video in enumerate(zip(*clip, strict=True)):
            j, f, both = (measure(*clip, **options)[i].item() for measure in measures)
            ways = reference_video(*video, **options)
            means = [(mean_of(one.j for one in way), mean_of(one.f for one in way)) for way in ways]
            assert both == pytest.approx(sum(means[0]) / 2, abs=1e-12)
            assert any((j, f) == pytest.approx(mean, abs=1e-12) for mean in means)

    @pytest.mark.parametrize("radius", [*range(11), 40])
    @pytest.mark.parametrize("shape", [(30, 41), (1, 50), (50, 1)])
    def test_dilation_by_a_disk(self, radius: int, shape: tuple[int, int]) -> None:
        marks = torch.rand(2, *shape, generator=torch.Generator().manual_seed(radius)) < 0.02
        marks[0, 0, 0] = True
        expected = np.stack([ndimage.binary_dilation(one, disk(radius)) for one in marks.numpy()])
        before = marks.clone()
        assert np.array_equal(within(marks, radius).numpy(), expected)
        assert torch.equal(marks, before)

    # two objects and two slots with six pixels take 24 elements per frame
    @pytest.mark.parametrize("block", [1, 24, 48, 71, 72, 24 * 7])
    @pytest.mark.parametrize("matching", ["ids", "hungarian"])
    def test_blocks_of_frames_change_nothing(self, block: int, matching: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        pred, target = torch.randint(1, 3, (2, 1, 7, 2, 3), generator=torch.Generator().manual_seed(0))
        at_once = j_and_f(pred, target, background=0, matching=matching)
        monkeypatch.setattr(jf, "_BLOCK", block)
        assert_scores(j_and_f(pred, target, background=0, matching=matching), at_once.tolist())


def mean_of(values: Any) -> float:
    listed = list(values)
    return fmean(listed) if listed else 0.0


class TestByHand:
    @pytest.mark.parametrize(("radius", "matched"), [(0, 6), (1, 10), (2, 14), (3, 20)])
    def test_f_of_a_square_shifted_by_three(self, radius: int, matched: int) -> None:
        # contours are marked above and to the left, so that of 5 x 5 is the rim of 6 x 6, rows and columns 4 to 9
        target, pred = square(5, (5, 5)), square(5, (5, 8))
        assert int(contours(target == 1).sum()) == 20
        # rows 4 and 9 match in columns 7 to 9, and in one more column per pixel of the radius; column 7 matches at its
        # ends (radius 1) or entirely (radius 2), as column 9 is two away; column 12 is three away
        tolerance = 0.99 * radius / math.hypot(20, 20)
        assert_scores(contour_accuracy(pred, target, background=0, tolerance=tolerance), [matched / 20])

    @pytest.mark.parametrize(("height", "width", "radius"), [(480, 854, 8), (75, 100, 1), (76, 100, 2)])
    def test_the_default_tolerance_is_0_008_of_the_diagonal_rounded_up(
        self, height: int, width: int, radius: int
    ) -> None:
        target = torch.zeros(1, 1, height, width, dtype=torch.int64)
        target[..., : width // 2] = 1
        within_reach, beyond = target.roll(radius, -1), target.roll(radius + 1, -1)
        for pred in (within_reach, beyond):
            pred[..., : radius + 1] = 1
        assert contour_accuracy(within_reach, target, background=0).tolist() == [1.0]
        assert contour_accuracy(beyond, target, background=0).tolist() == [0.0]

    def test_the_border_of_the_frame_is_not_a_contour(self) -> None:
        full = torch.ones(1, 1, 3, 4, dtype=torch.int64)
        assert not contours(full == 1).any()
        assert contour_accuracy(full, full, background=0).tolist() == [1.0]
        # the last pixel of a frame is never marked, but its neighbors are
        corner = torch.zeros(3, 4, dtype=torch.bool)
        corner[2, 3] = True
        assert contours(corner).nonzero().tolist() == [[1, 2], [1, 3], [2, 2]]


class TestMatching:
    def test_a_slot_without_annotated_pixels_cannot_be_matched(self) -> None:
        # an empty mask would be right in three of four frames
        target = frames([1, 1, VOID], [0, 0, 0], [0, 0, 0], [0, 0, 0])
        pred = frames([5, 5, 6], [5, 5, 5], [5, 5, 5], [5, 5, 5])
        assert_scores(region_similarity(pred, target, background=0, matching="hungarian"), [1 / 4])

    def test_only_hungarian_matching_needs_scipy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "scipy.optimize", None)
        labels = frames([0, 1])
        with pytest.raises(ImportError, match=r'`matching="hungarian"` needs scipy: pip .*"ssync-loss\[metrics\]"'):
            j_and_f(labels, labels, background=0, matching="hungarian")
        assert j_and_f(labels, labels, background=0).tolist() == [1.0]


class TestMetricAverage:
    def test_is_the_mean_over_objects(self) -> None:
        average = MetricAverage(j_and_f, background=0, skip_first=1)
        # three objects score 1, one scores 0, and the last video has none
        average.update(frames([0, 1, 2, 3], [0, 1, 2, 3]), frames([0, 1, 2, 3], [0, 1, 2, 3]))
        average.update(frames([0, 1, 1, 0], [0, 0, 0, 0]), frames([0, 1, 1, 0], [0, 1, 1, 0]))
        average.update(frames([0, 1], [0, 1]), frames([0, 0], [0, 0]))
        assert repr(average) == "j_and_f(background=0, skip_first=1) = 0.7500 over 4 objects"


LEAVE = "`skip_first` and `skip_last` must leave a frame of T=2; got "


@pytest.mark.parametrize("measure", measures)
class TestErrors:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"skip_first": -1}, ValueError, "`skip_first` must be at least 0; got -1"),
            ({"skip_first": 2}, ValueError, LEAVE + "2 and 0."),
            ({"skip_first": 1, "skip_last": 1}, ValueError, LEAVE + "1 and 1."),
            ({"tolerance": 8}, ValueError, "`tolerance` must be within [0.0, 1.0]; got 8."),
            ({"tolerance": math.nan}, ValueError, "`tolerance` must be within [0.0, 1.0]; got nan."),
        ],
    )
    def test_options(
        self, measure: Callable[..., Tensor], options: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        labels = torch.zeros(1, 2, 3, 3, dtype=torch.int64)
        refuses(error, message, measure, labels, labels, **{"background": 0, **options})

    def test_a_clip_without_frames_has_none_to_skip(self, measure: Callable[..., Tensor]) -> None:
        empty = torch.zeros(1, 0, 3, 3, dtype=torch.int64)
        with pytest.raises(ValueError, match="must leave a frame of T=0; got 1 and 0"):
            measure(empty, empty, background=0, skip_first=1)
