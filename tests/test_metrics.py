"""Metrics against slow counting, scikit-learn, all permutations and values computed by hand."""

import copy
import inspect
import itertools
import pickle
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from statistics import fmean
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import adjusted_rand_score
from torch import Tensor
from torch.nn import functional as F

from refusals import refuses
from ssync_loss import metrics
from ssync_loss.metrics import (
    MetricAverage,
    ari,
    contour_accuracy,
    fg_ari,
    fragmentation,
    has_objects,
    image_fg_ari,
    image_mbo,
    image_miou,
    j_and_f,
    masks_to_labels,
    mean_best_overlap,
    mean_iou,
    object_recall,
    objects_to_labels,
    region_similarity,
    unused_slots,
    video_ari,
    video_fg_ari,
    video_mbo,
    video_miou,
)
from ssync_loss.metrics._contingency import Per

VOID = -1
# ids are only names: adjacent ids, ids that need a sorted table
# (0 and 299 on both sides), and ids whose difference overflows
TARGET_IDS = [VOID, 0, 1, 9, 299, 2**40, -(2**62)]
PRED_IDS = [0, 1, 2, 299, -7, 2**62]

with_background = [fg_ari, mean_best_overlap, mean_iou]
per_frame = [object_recall, fragmentation]
scored_on_ground_truth = [*with_background, *per_frame]
tracked = [
    partial(measure, matching=matching)
    for measure in (region_similarity, contour_accuracy, j_and_f)
    for matching in ("ids", "hungarian")
]


@st.composite
def clips(draw: st.DrawFn, frames: int = 3) -> tuple[Tensor, Tensor]:
    """Draw a prediction and its ground truth. Pixels and ids are few, so that empty sets are common."""
    shape = draw(hnp.array_shapes(min_dims=4, max_dims=4, max_side=frames))
    pred_ids = draw(st.lists(st.sampled_from(PRED_IDS), min_size=1, max_size=4))
    target_ids = draw(st.lists(st.sampled_from(TARGET_IDS), min_size=1, max_size=4))
    pred = draw(hnp.arrays(np.int64, shape, elements=st.sampled_from(pred_ids), fill=st.nothing()))
    target = draw(hnp.arrays(np.int64, shape, elements=st.sampled_from(target_ids), fill=st.nothing()))
    return torch.from_numpy(pred), torch.from_numpy(target)


backgrounds = st.sampled_from([None, 0, 9])
units = st.sampled_from(["video", "image"])

# --- the slow reference: a loop over pixels ---

Pixel = tuple[int, int]


def pixels_of(pred: Tensor, target: Tensor) -> list[Pixel]:
    """List the (object, slot) of every annotated pixel."""
    pairs = zip(target.flatten().tolist(), pred.flatten().tolist(), strict=True)
    return [pair for pair in pairs if pair[0] >= 0]


def units_of(pred: Tensor, target: Tensor, per: str) -> list[list[list[Pixel]]]:
    """List the units of every video, each as its annotated pixels."""
    videos = zip(pred, target, strict=True)
    if per == "video":
        return [[pixels_of(*video)] for video in videos]
    return [[pixels_of(*frame) for frame in zip(*video, strict=True)] for video in videos]


def exact_ari(pixels: list[Pixel] | Counter[Pixel]) -> Fraction:
    """Compute the adjusted Rand index in exact arithmetic."""

    def pairs(counts: Counter[Any]) -> int:
        return sum(n * (n - 1) for n in counts.values())

    table = Counter(pixels)
    objects: Counter[int] = Counter()
    slots: Counter[int] = Counter()
    for (obj, slot), n in table.items():
        objects[obj] += n
        slots[slot] += n
    n = sum(table.values())
    r, a, b = pairs(table), pairs(objects), pairs(slots)
    expected = Fraction(a * b, n * (n - 1)) if n > 1 else Fraction(0)
    gap = Fraction(a + b, 2) - expected
    return (r - expected) / gap if gap else Fraction(1)


def overlaps(pixels: list[Pixel], background: int | None) -> list[list[Fraction]]:
    """Return the IoU of every object with every slot."""
    table, objects = Counter(pixels), Counter(obj for obj, _ in pixels)
    slots = Counter(slot for _, slot in pixels)
    return [
        [Fraction(table[o, s], objects[o] + slots[s] - table[o, s]) for s in slots] for o in objects if o != background
    ]


def best_matching(iou: list[list[Fraction]]) -> Fraction:
    """Try all one-to-one assignments of objects to slots."""
    num_slots = max(len(iou), *(len(row) for row in iou))
    padded = [row + [Fraction(0)] * (num_slots - len(row)) for row in iou]
    ways = itertools.permutations(range(num_slots), len(iou))
    return max(sum((padded[o][s] for o, s in enumerate(way)), Fraction(0)) for way in ways)


def mean_or(values: list[Any], empty: float) -> float:
    return float(fmean(map(float, values))) if values else empty


def reference_ari(pred: Tensor, target: Tensor, *, background: int | None, per: str) -> list[float]:
    scores = []
    for video in units_of(pred, target, per):
        kept = [[pair for pair in unit if pair[0] != background] for unit in video]
        scores.append(mean_or([exact_ari(unit) for unit in kept if unit], 1.0))
    return scores


def reference_overlap(score: Callable[[list[list[Fraction]]], float]) -> Callable[..., list[float]]:
    """Return a metric that averages a score of overlaps over the units with an object."""

    def reference(pred: Tensor, target: Tensor, *, background: int | None, per: str) -> list[float]:
        return [
            mean_or([score(iou) for unit in video if (iou := overlaps(unit, background))], 0.0)
            for video in units_of(pred, target, per)
        ]

    return reference


reference_mbo = reference_overlap(lambda iou: fmean(float(max(row)) for row in iou))
# the best permutation
reference_miou = reference_overlap(lambda iou: float(best_matching(iou) / len(iou)))


def reference_recall(pred: Tensor, target: Tensor, *, background: int | None) -> list[float]:
    return [
        mean_or([max(row) > Fraction(1, 2) for frame in video for row in overlaps(frame, background)], 0.0)
        for video in units_of(pred, target, "image")
    ]


def reference_fragmentation(pred: Tensor, target: Tensor, *, background: int | None, over: str) -> list[float]:
    scores = []
    for video in units_of(pred, target, "image"):
        counts = []
        for frame in video:
            table, areas = Counter(frame), Counter(slot for _, slot in frame)
            for obj in {obj for obj, _ in frame} - {background}:
                counts.append(sum(2 * table[obj, slot] > areas[slot] for slot in areas))
        scores.append(mean_or([c for c in counts if c > 0 or over == "all"], 0.0))
    return scores


def assert_scores(actual: Tensor, expected: list[float], tolerance: float = 1e-12) -> None:
    assert actual.dtype == torch.float64
    assert actual.shape == (len(expected),)
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance, equal_nan=False
    )


def frames(*rows: list[int]) -> Tensor:
    """Build one video of one-row frames."""
    return torch.tensor(rows).unsqueeze(1).unsqueeze(0)


class TestAgainstTheReference:
    @pytest.mark.parametrize(
        ("metric", "reference"),
        [
            (fg_ari, reference_ari),
            (partial(ari), partial(reference_ari, background=None)),
            (mean_best_overlap, reference_mbo),
            (mean_iou, reference_miou),
            (object_recall, reference_recall),
            (partial(fragmentation, over="all"), partial(reference_fragmentation, over="all")),
            (partial(fragmentation, over="found"), partial(reference_fragmentation, over="found")),
        ],
    )
    @given(clips(), backgrounds, units)
    @settings(max_examples=120, deadline=None)
    def test_metrics(
        self, metric: Any, reference: Any, clip: tuple[Tensor, Tensor], background: int | None, per: Per
    ) -> None:
        options = {"background": background, "per": per}
        taken = {key: options[key] for key in options if key in inspect.signature(metric).parameters}
        assert_scores(metric(*clip, **taken), reference(*clip, **taken))

    @given(
        hnp.arrays(np.int64, hnp.array_shapes(min_dims=4, max_dims=4, max_side=3), elements=st.integers(0, 3)),
        st.integers(4, 6),
    )
    @settings(max_examples=100, deadline=None)
    def test_unused_slots(self, labels: np.ndarray[Any, Any], num_slots: int) -> None:
        pred = torch.from_numpy(labels)
        per_video = [1 - len(set(video.flatten().tolist())) / num_slots for video in pred]
        per_image = [fmean(1 - len(set(f.flatten().tolist())) / num_slots for f in video) for video in pred]
        assert_scores(unused_slots(pred, num_slots=num_slots), per_video)
        assert_scores(unused_slots(pred, num_slots=num_slots, per="image"), per_image)


def sklearn_ari(target: Tensor, pred: Tensor) -> float:
    with warnings.catch_warnings():
        # it takes labels for a regression target if most of them differ
        warnings.filterwarnings("ignore", message="The number of unique classes")
        return float(adjusted_rand_score(target.flatten().numpy(), pred.flatten().numpy()))


class TestARI:
    @given(st.integers(1, 30).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 4), min_size=n, max_size=n)] * 2)))
    @example(([0], [3]))
    @example(([0, 0, 0], [1, 1, 1]))
    @example(([0, 1, 2], [2, 1, 0]))
    @example(([0, 0, 0], [0, 1, 2]))
    @example(([0, 1, 2], [4, 4, 4]))
    @settings(max_examples=150, deadline=None)
    def test_equals_sklearn(self, labels: tuple[list[int], list[int]]) -> None:
        target, pred = frames(labels[0]), frames(labels[1])
        assert_scores(ari(pred, target), [sklearn_ari(target, pred)])
        assert_scores(fg_ari(pred, target, background=None), [sklearn_ari(target, pred)])

    def test_is_exact_on_a_clip_of_8_million_pixels(self) -> None:
        sizes = {(0, 0): 3_000_001, (0, 1): 499_999, (1, 1): 2_700_000, (1, 2): 849_720, (2, 2): 1_000_000}
        repeats = torch.tensor(list(sizes.values()))
        assert int(repeats.sum()) == 30 * 518 * 518
        target, pred = (
            torch.tensor([pair[i] for pair in sizes], dtype=torch.uint8)
            .repeat_interleave(repeats)
            .view(1, 30, 518, 518)
            for i in (0, 1)
        )
        assert_scores(video_ari(pred, target), [float(exact_ari(Counter(sizes)))], 1e-14)

    @pytest.mark.parametrize("side", [1, 2, 142])
    @pytest.mark.parametrize(("num_objects", "num_slots"), [(1, 1), (0, 0)])
    def test_is_exactly_1_if_the_denominator_is_0(self, side: int, num_objects: int, num_slots: int) -> None:
        shape = (1, 1, side, side)
        apart = torch.arange(side * side).view(shape)
        target = torch.zeros_like(apart) if num_objects else apart
        pred = torch.ones_like(apart) if num_slots else apart + 5
        assert ari(pred, target).tolist() == [1.0]


class TestOverlap:
    def test_a_slot_matches_two_objects_in_mbo_and_one_in_miou(self) -> None:
        target, pred = frames([1, 1, 2, 2]), frames([5, 5, 5, 5])
        assert_scores(mean_best_overlap(pred, target, background=None), [0.5])
        assert_scores(mean_iou(pred, target, background=None), [0.25])

    def test_matching_maximizes_the_sum_of_overlaps(self) -> None:
        # slot 5 is the best slot of objects 1 and 2; slot 6 covers only object 1
        target = frames([1] * 4 + [2] * 4 + [3] * 2)
        pred = frames([5] * 3 + [6] + [5] * 3 + [7] + [7] * 2)
        iou = [[3 / 7, 1 / 4, 0], [3 / 7, 0, 1 / 6], [0, 0, 2 / 3]]
        assert_scores(mean_best_overlap(pred, target, background=None), [fmean(max(row) for row in iou)])
        assert_scores(mean_iou(pred, target, background=None), [(1 / 4 + 3 / 7 + 2 / 3) / 3])

    def test_background_pixels_count_in_the_union(self) -> None:
        target, pred = frames([0, 0, 0, 1]), frames([5, 6, 6, 6])
        assert_scores(mean_best_overlap(pred, target, background=0), [1 / 3])
        assert_scores(mean_best_overlap(pred, target, background=None), [(1 / 3 + 2 / 4) / 2])
        assert_scores(mean_iou(pred, target, background=0), [1 / 3])
        assert_scores(mean_iou(pred, target, background=None), [max(1 / 3 + 1 / 3, 0 + 2 / 4) / 2])

    def test_miou_without_scipy_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "scipy.optimize", None)
        with pytest.raises(ImportError, match=r'mIoU needs scipy: pip install "ssync-loss\[metrics\]"'):
            mean_iou(frames([0]), frames([0]), background=None)
        assert mean_best_overlap(frames([0]), frames([0]), background=None).tolist() == [1.0]


class TestSlots:
    def test_a_slot_used_in_one_frame_is_in_use_in_the_video(self) -> None:
        pred = frames([0, 0, 0, 1], [0, 0, 2, 2])
        assert unused_slots(pred, num_slots=5).tolist() == [0.4]
        assert unused_slots(pred, num_slots=5, per="image").tolist() == [0.6]


class TestProperties:
    @pytest.mark.parametrize("metric", [video_fg_ari, image_fg_ari, video_mbo, video_miou, object_recall, *tracked])
    @given(clips(), backgrounds)
    @settings(max_examples=40, deadline=None)
    def test_the_ground_truth_scores_1(
        self, metric: Callable[..., Tensor], clip: tuple[Tensor, Tensor], background: int | None
    ) -> None:
        _, target = clip
        scored = has_objects(target, background=background)
        value = metric(target, target, background=background)
        assert torch.equal(value[scored], torch.ones_like(value[scored]))

    @pytest.mark.parametrize("per", ["video", "image"])
    @pytest.mark.parametrize(
        ("name", "general"), [("ari", ari), ("fg_ari", fg_ari), ("mbo", mean_best_overlap), ("miou", mean_iou)]
    )
    def test_prefixes_select_the_definition(self, name: str, general: Callable[..., Tensor], per: str) -> None:
        named = getattr(metrics, f"{per}_{name}")
        pred, target = frames([5, 5, 6], [6, 5, 5], [7, 7, 7]), frames([0, 1, 2], [0, 1, 2], [0, 2, 2])
        options = {} if general is ari else {"background": 0}
        other = "image" if per == "video" else "video"
        assert torch.equal(named(pred, target, **options), general(pred, target, **options, per=per))
        assert not torch.equal(named(pred, target, **options), general(pred, target, **options, per=other))

    @pytest.mark.parametrize(
        "metric", [*scored_on_ground_truth, video_fg_ari, image_fg_ari, video_mbo, image_mbo, has_objects]
    )
    def test_the_background_has_no_default(self, metric: Callable[..., Tensor]) -> None:
        parameter = inspect.signature(metric).parameters["background"]
        assert parameter.default is parameter.empty
        assert parameter.kind is parameter.KEYWORD_ONLY


class TestNothingToScore:
    @pytest.mark.parametrize("metric", scored_on_ground_truth)
    @pytest.mark.parametrize("nothing", [0, VOID])
    def test_a_video_without_an_object_has_the_documented_value(
        self, metric: Callable[..., Tensor], nothing: int
    ) -> None:
        target = torch.full((2, 2, 1, 2), nothing)
        target[1, 0, 0, 0] = 3
        pred = torch.zeros_like(target)
        scores = metric(pred, target, background=0)
        assert scores[0] == (metric is fg_ari)
        assert bool(scores.isfinite().all())
        assert has_objects(target, background=0).tolist() == [False, True]

    @pytest.mark.parametrize("metric", [*scored_on_ground_truth, *tracked])
    @pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 0, 3, 3), (2, 2, 0, 3), (2, 2, 3, 0)])
    def test_empty_batches_and_clips_pass(self, metric: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
        empty = torch.zeros(shape, dtype=torch.int64)
        scores = metric(empty, empty, background=None)
        assert scores.shape == (shape[0],)
        assert bool(scores.isfinite().all())

    def test_unused_slots_of_empty_batches_and_clips(self) -> None:
        assert unused_slots(torch.zeros(0, 2, 1, 1, dtype=torch.int64), num_slots=3).shape == (0,)
        nothing = torch.zeros(1, 2, 0, 1, dtype=torch.int64)
        assert unused_slots(nothing, num_slots=3).tolist() == [1.0]


class TestLabels:
    def test_the_largest_unsigned_ids_are_objects(self) -> None:
        target = torch.tensor([[[[2**64 - 1, 2**64 - 1, 7]]]], dtype=torch.uint64)
        assert ari(frames([5, 6, 6]), target).item() == pytest.approx(sklearn_ari(frames([1, 1, 7]), frames([5, 6, 6])))
        assert mean_best_overlap(frames([5, 5, 6]), target, background=None).tolist() == [1.0]
        assert has_objects(target, background=7).tolist() == [True]

    @pytest.mark.parametrize("metric", scored_on_ground_truth)
    def test_more_ids_than_a_full_table_holds(self, metric: Callable[..., Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        pred = torch.randint(-(2**62), 2**62, (2, 3, 40, 40), generator=generator)
        target = torch.randint(0, 2**62, (2, 3, 40, 40), generator=generator)
        target[:, :, :20] = target[:, :, 20:]
        pred[:, :, :20] = pred[:, :, 20:]
        # every object has two pixels, which share a slot: a perfect score
        assert torch.equal(metric(pred, target, background=None), torch.ones(2, dtype=torch.float64))

    def test_strided_labels(self) -> None:
        target = torch.arange(24).view(2, 3, 4).remainder(3).expand(2, 2, 3, 4).transpose(2, 3)
        pred = torch.arange(48).view(2, 2, 3, 4).remainder(5).transpose(2, 3)
        for metric in scored_on_ground_truth:
            assert torch.equal(
                metric(pred, target, background=0),
                metric(pred.contiguous(), target.contiguous(), background=0),
            )


class TestMasksToLabels:
    def test_resizes_probabilities_before_the_argmax(self) -> None:
        # slot 1 wins neither of two patches, but its probability wins half-way between them
        probs = torch.tensor([[0.6, 0.0], [0.4, 0.45], [0.0, 0.55]])
        masks = probs.log().view(1, 1, 3, 1, 2)
        # an odd width has a pixel on the border, with probabilities .3 .425 .275
        assert masks_to_labels(masks, (1, 3)).tolist() == [[[[0, 1, 2]]]]
        assert masks_to_labels(masks, (1, 2)).tolist() == [[[[0, 2]]]]

    @pytest.mark.parametrize("size", [(5, 7), (3, 2), (10, 8)])
    def test_kinds_agree_and_equal_torch(self, size: tuple[int, int]) -> None:
        logits = torch.randn(2, 3, 4, 5, 4, generator=torch.Generator().manual_seed(0))
        probs = logits.softmax(2)
        expected = torch.stack(
            [F.interpolate(video, size=size, mode="bilinear", align_corners=False).argmax(1) for video in probs]
        )
        assert torch.equal(masks_to_labels(logits, size), expected)
        assert torch.equal(masks_to_labels(probs, size, kind="probs"), expected)

    def test_blocks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        logits = torch.randn(2, 3, 4, 5, 4, generator=torch.Generator().manual_seed(0))
        whole = masks_to_labels(logits, (9, 9))
        for frames_at_once in (1, 4):
            monkeypatch.setattr("ssync_loss.metrics.labels._BLOCK", frames_at_once * 4 * 9 * 9)
            assert torch.equal(masks_to_labels(logits, (9, 9)), whole)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_precisions(self, dtype: torch.dtype) -> None:
        logits = torch.randn(1, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        labels = masks_to_labels(logits.requires_grad_(), (40, 40))
        assert labels.dtype == torch.int64
        assert torch.equal(labels, masks_to_labels(logits.detach().double(), (40, 40)))

    def test_ties_go_to_the_lowest_slot(self) -> None:
        assert masks_to_labels(torch.zeros(1, 1, 3, 2, 2), (1, 4)).tolist() == [[[[0] * 4]]]

    def test_absent_slots_never_win_and_empty_patches_have_no_weight(self) -> None:
        masks = torch.zeros(1, 1, 3, 1, 3)
        masks[:, :, 0] = -torch.inf
        masks[:, :, 2] = 1.0
        assert masks_to_labels(masks, (1, 6)).tolist() == [[[[2] * 6]]]
        # no slot is present at the middle patch, so pixels near a neighbor take its slot
        masks[..., 1] = -torch.inf
        assert masks_to_labels(masks, (1, 3)).tolist() == [[[[2, 0, 2]]]]
        assert masks_to_labels(masks, (1, 6)).tolist() == [[[[2] * 6]]]

    def test_no_frames(self) -> None:
        assert masks_to_labels(torch.zeros(2, 0, 3, 2, 2), (4, 5)).shape == (2, 0, 4, 5)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("kind", ["logits", "probs"])
    def test_nan_and_infinity_are_refused(self, bad: float, kind: Any) -> None:
        masks = torch.full((1, 1, 2, 2, 2), 0.5)
        masks[0, 0, 1, 0, 1] = bad
        with pytest.raises(ValueError, match=r"`masks` must hold neither NaN nor \+inf"):
            masks_to_labels(masks, (2, 2), kind=kind)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"masks": torch.zeros(1, 1, 0, 2, 2)}, ValueError, "`masks` must have S >= 1; got S=0."),
            ({"kind": "probs"}, ValueError, "`masks` must be at least 0 with kind='probs'; got -0.5."),
            ({"size": (4,)}, ValueError, "`size` must be a pair (height, width); got (4,)."),
            ({"size": 4}, ValueError, "`size` must be a pair (height, width); got 4."),
            ({"size": (4, 0)}, ValueError, "`size` must be at least 1; got 0."),
            ({"size": (4, 2.0)}, TypeError, "`size` must be an integer; got float."),
        ],
    )
    def test_errors(self, changes: dict[str, Any], error: type[Exception], message: str) -> None:
        masks = torch.full((1, 1, 2, 2, 2), -0.5)
        refuses(error, message, masks_to_labels, **{"masks": masks, "size": (4, 4)} | changes)


class TestObjectsToLabels:
    def test_numbers_objects_from_1(self) -> None:
        masks = F.one_hot(frames([0, 1, 2, 2], [2, 0, 0, 1]), 3).movedim(-1, 2).bool()
        assert objects_to_labels(masks).tolist() == [[[[1, 2, 3, 3]], [[3, 1, 1, 2]]]]
        assert objects_to_labels(masks[:, :, 1:]).tolist() == [[[[0, 1, 2, 2]], [[2, 0, 0, 1]]]]

    def test_overlaps_are_refused_or_ignored(self) -> None:
        masks = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]]).view(1, 1, 2, 1, 4).bool()
        with pytest.raises(ValueError, match="`masks` must not overlap unless ignore_overlaps=True; got 1 pixels"):
            objects_to_labels(masks)
        target = objects_to_labels(masks, ignore_overlaps=True)
        assert mean_best_overlap(frames([5, 6, 6, 7]), target, background=0).tolist() == [1.0]

    def test_no_objects(self) -> None:
        assert objects_to_labels(torch.zeros(1, 1, 0, 1, 2, dtype=torch.bool)).tolist() == [[[[0, 0]]]]


class TestMetricAverage:
    @pytest.mark.parametrize("metric", [video_fg_ari, image_fg_ari, video_mbo, image_miou, object_recall])
    @given(st.lists(clips(), min_size=1, max_size=4), st.integers(0, 4))
    @settings(max_examples=25, deadline=None)
    def test_merged_batches_equal_one_pass(
        self, metric: Callable[..., Tensor], batches: list[tuple[Tensor, Tensor]], cut: int
    ) -> None:
        once = MetricAverage(metric, background=0)
        first, second = MetricAverage(metric, background=0), MetricAverage(metric, background=0)
        for i, batch in enumerate(batches):
            once.update(*batch)
            (first if i < cut else second).update(*batch)
        first.merge(second)
        torch.testing.assert_close(first.state, once.state, rtol=0, atol=1e-12)
        assert repr(first) == repr(once)

    @given(st.lists(clips(), min_size=1, max_size=3))
    @settings(max_examples=50, deadline=None)
    def test_is_the_mean_over_videos_with_an_object(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        average = MetricAverage(video_fg_ari, background=0)
        values: list[float] = []
        for pred, target in batches:
            average.update(pred, target)
            shown = has_objects(target, background=0)
            values += video_fg_ari(pred, target, background=0)[shown].tolist()
        assert average.state[1] == len(values)
        if values:
            assert average.compute().item() == pytest.approx(fmean(values), abs=1e-12)

    def test_an_image_metric_weights_frames_equally(self) -> None:
        average = MetricAverage(image_mbo, background=0)
        # one frame scores 1/2, then three score 1
        average.update(frames([5, 5], [5, 5], [5, 5]), frames([1, 2], [0, 0], [0, 0]))
        average.update(frames([5, 6], [5, 6], [5, 6]), frames([1, 2], [1, 2], [1, 2]))
        assert average.compute().item() == (0.5 + 3) / 4
        assert repr(average) == "image_mbo(background=0) = 0.8750 over 4 frames"

    def test_an_object_metric_weights_objects_equally(self) -> None:
        recall = MetricAverage(object_recall, background=0)
        pieces = MetricAverage(fragmentation, background=0, over="found")
        for average in (recall, pieces):
            average.update(frames([5, 6, 6, 7]), frames([0, 1, 1, 2]))
            average.update(frames([5, 5, 5, 5]), frames([0, 0, 0, 1]))
        assert recall.compute().item() == 2 / 3
        assert repr(pieces) == ("fragmentation(background=0, over='found') = 1.0000 over 2 objects in frames")

    def test_accepts_a_metric_without_ground_truth(self) -> None:
        average = MetricAverage(unused_slots, num_slots=4)
        average.update(frames([0, 1]))
        average.update(frames([0, 0]))
        assert repr(average) == "unused_slots(num_slots=4) = 0.6250 over 8 slots"

    def test_accepts_every_metric_of_the_package(self) -> None:
        pred, target = frames([0, 1, 1, 2], [0, 1, 2, 2]), frames([0, 0, 1, 2], [0, 1, 1, 2])
        scores = set(metrics.__all__) - {
            "MetricAverage",
            "has_objects",
            "masks_to_labels",
            "objects_to_labels",
        }
        assert len(scores) == 18
        for name in scores:
            metric = cast("Callable[..., Tensor]", getattr(metrics, name))
            taken = inspect.signature(metric).parameters
            options = {k: v for k, v in {"background": 0, "num_slots": 4}.items() if k in taken}
            tensors = (pred, target) if "target" in taken else (pred,)
            average = MetricAverage(metric, **options)
            average.update(*tensors)
            assert average.compute().item() == pytest.approx(metric(*tensors, **options).item(), abs=1e-12)

    def test_compute_is_float64_and_reset_clears(self) -> None:
        average = MetricAverage(video_ari)
        average.update(frames([1, 2, 2]), frames([1, 2, 2]))
        assert average.compute().dtype == torch.float64
        assert average.compute().shape == ()
        average.reset()
        assert average.state.tolist() == [0.0, 0.0]
        average.update(frames([1, 1, 2]), frames([1, 2, 2]))
        assert average.compute().item() == ari(frames([1, 1, 2]), frames([1, 2, 2])).item()

    def test_states_can_be_summed_over_ranks(self) -> None:
        ranks = [MetricAverage(video_mbo, background=None) for _ in range(2)]
        ranks[0].update(frames([5, 5]), frames([1, 2]))
        ranks[1].update(frames([5, 6]).expand(3, 1, 1, 2), frames([1, 2]).expand(3, 1, 1, 2))
        ranks[0].state.add_(ranks[1].state)
        assert ranks[0].compute().item() == (0.5 + 3) / 4

    def test_survives_pickle_and_deepcopy(self) -> None:
        average = MetricAverage(video_fg_ari, background=0)
        average.update(frames([5, 5, 6]), frames([1, 1, 2]))
        for twin in (pickle.loads(pickle.dumps(average)), copy.deepcopy(average)):
            twin.update(frames([5, 5, 5]), frames([1, 1, 2]))
            assert repr(twin) == "video_fg_ari(background=0) = 0.5000 over 2 videos"
        assert repr(average) == "video_fg_ari(background=0) = 1.0000 over 1 videos"

    def test_an_empty_average_is_an_error(self) -> None:
        average = MetricAverage(video_fg_ari, background=0)
        message = r"video_fg_ari\(background=0\) has nothing to average: call update\(\) first"
        with pytest.raises(RuntimeError, match=message):
            average.compute()
        average.update(frames([1, 2]), frames([0, 0]))
        with pytest.raises(RuntimeError, match=message):
            average.compute()
        assert repr(average) == "video_fg_ari(background=0), nothing to average yet"

    @pytest.mark.parametrize(
        ("metric", "options", "message"),
        [
            (torch.add, {}, "`metric` must be one of the functions ari, video_ari, image_ari, fg_ari, "),
            ([ari], {}, "`metric` must be one of the functions ari, video_ari, image_ari, fg_ari, "),
            (video_fg_ari, {}, "`options` must fit video_fg_ari: missing a required "),
            (video_ari, {"background": 0}, "`options` must fit video_ari: got an unexpected keyword argument "),
        ],
    )
    def test_other_metrics_and_options_are_refused(self, metric: Any, options: dict[str, Any], message: str) -> None:
        refuses(TypeError, message, MetricAverage, metric, **options)

    def test_other_averages_are_not_merged(self) -> None:
        average = MetricAverage(fg_ari, background=0)
        for other, got in ((fg_ari, "fg_ari(background=1)"), (image_fg_ari, "image_fg_ari(background=1)")):
            message = f"`other` must average fg_ari(background=0); got {got}."
            refuses(ValueError, message, average.merge, MetricAverage(other, background=1))
        refuses(TypeError, "`other` must be MetricAverage; got str.", average.merge, "fg_ari")


LABELS = torch.zeros(1, 2, 3, 3, dtype=torch.int64)


class TestErrors:
    @pytest.mark.parametrize("metric", [*scored_on_ground_truth, *tracked])
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"target": LABELS[:, :1]}, ValueError, "`target` must have shape (B=1, T=2, H=3, W=3); got (1, 1, 3, 3)."),
            ({"background": -1}, ValueError, "`background` must be at least 0; got -1."),
            ({"background": True}, TypeError, "`background` must be an integer; got bool."),
        ],
    )
    def test_labels(self, metric: Any, changes: dict[str, Any], error: type[Exception], message: str) -> None:
        refuses(error, message, metric, **{"pred": LABELS, "target": LABELS, "background": 0} | changes)

    @pytest.mark.parametrize(
        ("pred", "options", "message"),
        [
            ([0, 3], {"num_slots": 3}, "`pred` must lie within [0, 2]; got values from 0 to 3."),
            ([-1, 2], {"num_slots": 4}, "`pred` must lie within [0, 3]; got values from -1 to 2."),
            ([0, 3], {"num_slots": 0}, "`num_slots` must be at least 1; got 0."),
        ],
    )
    def test_unused_slots(self, pred: list[int], options: dict[str, Any], message: str) -> None:
        refuses(ValueError, message, unused_slots, frames(pred), **options)
