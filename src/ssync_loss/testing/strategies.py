"""Hypothesis strategies for slot graphs, label videos, masks and pairs of maps.

One example is a batch of many small clips, each quickly made from a seed: ``max_examples`` times ``batch`` clips are
tested. Ties, constants, empty masks, single frames, single slots and maps that are not square are common. When a test
fails, hypothesis shrinks the sizes, and every irrelevant clip to its plainest form (all zero, all valid, nothing
selected); ``batch=1`` shows the clip alone.

In all strategies ``batch`` is the number of clips in an example, ``max_slots``, ``max_frames``, ``max_height`` and
``max_width`` are the largest sizes, and ``maps`` is the strategy for maps, by default ``map_pairs()``. With
``empty=False`` every clip has a valid patch and a present slot. hypothesis passes ``draw``.

>>> from hypothesis import given, settings
>>> from ssync_loss.testing import map_pairs, reference_slot_overlap
>>> @settings(max_examples=10, deadline=None, derandomize=True, database=None)
... @given(map_pairs(batch=4))
... def overlap_is_symmetric(maps):
...     overlap = reference_slot_overlap(maps.enc_logits)
...     assert torch.equal(overlap, overlap.mT)
>>> overlap_is_symmetric()
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from ssync_loss.testing import _clips

# far from small fractions, so that rounding rarely moves an overlap across the threshold
GENERIC_THRESHOLDS = (0.6180339887, 0.3535533906, 0.7853981634, 0.1234567891, 0.9091909391)


class SlotGraph(NamedTuple):
    """The input of merging.

    Attributes:
        overlap: (B, S, S), symmetric.
        area: (B, S), int64.

    Raises: nothing; fields are not checked.

    >>> from ssync_loss.testing import reference_merge_slots
    >>> graph = SlotGraph(overlap=torch.ones(1, 2, 2), area=torch.tensor([[4, 9]]))
    >>> reference_merge_slots(*graph, threshold=0.6).tolist()
    [[1, 1]]
    """

    overlap: Tensor
    area: Tensor


class MapPair(NamedTuple):
    """Two maps.

    Attributes:
        enc_logits, dec_logits: (B, T, S, H, W), of the encoder and of the decoder.

    Raises: nothing; fields are not checked.

    >>> from ssync_loss.testing import reference_ssync
    >>> maps = MapPair(torch.eye(2).view(1, 1, 2, 1, 2), torch.zeros(1, 1, 2, 1, 2))
    >>> reference_ssync(*maps).boundary.item()  # (1/2 - 1)^2
    0.25
    """

    enc_logits: Tensor
    dec_logits: Tensor


class SSyncCase(NamedTuple):
    """Two maps and their masks, with the names of arguments: ``pseudo_labels(**case._asdict())``.

    Attributes:
        enc_logits, dec_logits: (B, T, S, H, W), of the encoder and of the decoder.
        valid: (B, T) or (B, T, H, W), bool, valid patches, or None.
        slot_mask: (B, S), bool, present slots, or None.

    Raises: nothing; fields are not checked.

    >>> from ssync_loss.testing import reference_pseudo_labels
    >>> case = SSyncCase(*torch.zeros(2, 1, 2, 1, 1, 1), valid=torch.tensor([[True, False]]), slot_mask=None)
    >>> reference_pseudo_labels(**case._asdict()).interior.tolist()
    [[[[True]], [[False]]]]
    """

    enc_logits: Tensor
    dec_logits: Tensor
    valid: Tensor | None
    slot_mask: Tensor | None


class DistillationCase(NamedTuple):
    """A student, its targets and its region: ``selective_distillation_loss(**case._asdict())``.

    Attributes:
        logits: (B, T, S, H, W), the map.
        target: (B, T, H, W), int64. Every label names a present slot, except in a clip that has none, where it is 0.
        region: (B, T, H, W), bool.
        slot_mask: (B, S), bool, present slots, or None.

    Raises: nothing; fields are not checked.

    >>> from ssync_loss.testing import reference_selective_distillation_loss
    >>> target = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    >>> case = DistillationCase(torch.zeros(1, 1, 2, 1, 1), target, region=target == 0, slot_mask=None)
    >>> reference_selective_distillation_loss(**case._asdict()).item()  # (1/2 - 1)^2
    0.25
    """

    logits: Tensor
    target: Tensor
    region: Tensor
    slot_mask: Tensor | None


def thresholds(*, tied: bool = True) -> st.SearchStrategy[float | None]:
    """Draw a merge threshold, or None for no merging.

    Tied thresholds are values of the overlaps of :func:`slot_graphs`, so that an overlap often equals the threshold.
    Other thresholds are 0, 1 and values far from small fractions, for end-to-end tests. Rounding must not decide there,
    see :func:`decidable_clips`.

    Raises: nothing.

    >>> from hypothesis import find
    >>> find(thresholds(), lambda threshold: threshold is not None)
    0.0
    """
    return st.sampled_from((None, *(_clips.OVERLAPS if tied else (0.0, 1.0, *GENERIC_THRESHOLDS))))


def region_knobs() -> st.SearchStrategy[dict[str, int]]:
    """Draw ``min_different``, ``min_same`` and ``max_different``, each in 0 … 10 and mostly small.

    Raises: nothing.

    >>> from hypothesis import find
    >>> find(region_knobs(), lambda knobs: knobs["min_same"] == 10)
    {'min_different': 1, 'min_same': 10, 'max_different': 0}
    """
    low, high = st.sampled_from((1, 0, 2, 3, 4, 10)), st.sampled_from((0, 1, 2, 5, 10))
    return st.fixed_dictionaries({"min_different": low, "min_same": low, "max_different": high})


@st.composite
def slot_graphs(
    draw: st.DrawFn,
    *,
    batch: int = 16,
    max_slots: int = 9,
    distinct_areas: bool = False,
    dtype: torch.dtype = torch.float32,
) -> SlotGraph:
    """Draw inputs of merging: long paths, trees, cliques and random graphs.

    Overlaps and areas have few values, so that overlaps often equal each other or the threshold, and largest areas of a
    group often tie. With ``distinct_areas`` all slots of a clip have different areas. The overlap has type ``dtype``.

    Raises: InvalidArgument of hypothesis, ValueError or TypeError at the first draw, if a size is below 1.

    >>> from hypothesis import find
    >>> find(slot_graphs(batch=1), lambda graph: len(graph.area[0]) > 1).overlap.tolist()
    [[[0.0, 0.0], [0.0, 0.0]]]
    """
    slots = draw(_up_to(max_slots))
    clips = [_clips.graph_clip(seed, slots, distinct_areas=distinct_areas) for seed in draw(_seeds(batch))]
    overlap, area = (_stack(part) for part in zip(*clips, strict=True))
    return SlotGraph(overlap.to(dtype), area)


@st.composite
def label_videos(
    draw: st.DrawFn,
    *,
    batch: int = 16,
    num_slots: int = 4,
    max_frames: int = 3,
    max_height: int = 5,
    max_width: int = 6,
) -> Tensor:
    """Draw labels (B, T, H, W), int64, within [0, num_slots): moving boxes, single dots, checkers, noise, constants.

    Raises: InvalidArgument of hypothesis, ValueError or TypeError at the first draw, if a size is below 1.

    >>> from hypothesis import find
    >>> find(label_videos(batch=1), lambda labels: labels.numel() > 1).flatten().tolist()
    [0, 0]
    """
    shape = draw(_shapes(max_frames, max_height, max_width))
    return _stack(_clips.label_clip(seed, shape, num_slots) for seed in draw(_seeds(batch)))


@st.composite
def map_pairs(
    draw: st.DrawFn,
    *,
    batch: int = 16,
    max_slots: int = 5,
    max_frames: int = 3,
    max_height: int = 5,
    max_width: int = 6,
    ties: bool = True,
    minus_inf: bool = False,
    dtype: torch.dtype = torch.float32,
) -> MapPair:
    """Draw an encoder and a decoder map (B, T, S, H, W): objects, noise, constants, redundant slots.

    All logits are dyadic, so that comparisons with a mean do not depend on precision and order of summation. The
    decoder's map equals the encoder's, is shifted, or is unrelated.

    Without ``ties`` all slots of a patch have different logits, and every argmax is unique. With ``minus_inf`` some
    logits, some whole slots and (with ``ties``) some whole patches are -inf.

    Raises: InvalidArgument of hypothesis, ValueError or TypeError at the first draw, if a size is below 1.

    >>> from hypothesis import find
    >>> find(map_pairs(batch=1), lambda maps: maps.enc_logits.numel() > 1).dec_logits.flatten().tolist()
    [0.0, 0.0]
    """
    slots = draw(_up_to(max_slots))
    shape = draw(_shapes(max_frames, max_height, max_width))
    seeds = draw(_seeds(batch))
    clips = [_clips.map_pair_clip(seed, shape, slots, ties=ties, minus_inf=minus_inf) for seed in seeds]
    return MapPair(*(_stack(part).to(dtype) for part in zip(*clips, strict=True)))


@st.composite
def valid_masks(draw: st.DrawFn, *size: int, empty: bool = True) -> Tensor:
    """Draw valid patches of the given size, (B, T, H, W) or (B, T): all, a box, some frames, some patches, none.

    Raises: InvalidArgument of hypothesis, ValueError or TypeError at the first draw, if a size is below 1.

    >>> from hypothesis import find
    >>> find(valid_masks(1, 2), lambda valid: not valid.any()).tolist()
    [[False, False]]
    """
    batch, *shape = size
    return _stack(_clips.mask_clip(seed, shape, plain=True, empty=empty) for seed in draw(_seeds(batch)))


def slot_masks(batch: int, slots: int, *, empty: bool = True) -> st.SearchStrategy[Tensor]:
    """Draw present slots (B, S): all, some, one, none.

    Raises: InvalidArgument of hypothesis, ValueError or TypeError at the first draw, if a size is below 1.

    >>> from hypothesis import find
    >>> find(slot_masks(1, 2), lambda mask: not mask.any()).tolist()
    [[False, False]]
    """
    return valid_masks(batch, slots, empty=empty)


@st.composite
def ssync_cases(draw: st.DrawFn, *, empty: bool = True, maps: st.SearchStrategy[MapPair] | None = None) -> SSyncCase:
    """Draw inputs of pseudo-labels: two maps, and sometimes valid patches and present slots.

    As code::

        @given(ssync_cases(maps=map_pairs(minus_inf=True)), thresholds(tied=False), region_knobs())
        def test_fast_labels_equal_slow_ones(case, threshold, knobs):
            actual = pseudo_labels(**case._asdict(), merge_threshold=threshold, **knobs)
            wanted = reference_pseudo_labels(**case._asdict(), merge_threshold=threshold, **knobs)
            assert_same_labels(actual, wanted)

    Raises: only what ``maps`` raises.

    >>> from hypothesis import find
    >>> find(ssync_cases(maps=map_pairs(batch=1)), lambda case: case.slot_mask is not None).slot_mask.tolist()
    [[True]]
    """
    enc, dec = draw(map_pairs() if maps is None else maps)
    b, t, s, h, w = enc.shape
    size: tuple[int, ...] = draw(st.sampled_from(((), (b, t), (b, t, h, w), (b, t, h, w))))
    valid = draw(valid_masks(*size, empty=empty)) if size else None
    slot_mask = draw(st.none() | slot_masks(b, s, empty=empty))
    return SSyncCase(enc, dec, valid, slot_mask)


@st.composite
def distillation_cases(
    draw: st.DrawFn, *, empty: bool = True, maps: st.SearchStrategy[MapPair] | None = None
) -> DistillationCase:
    """Draw the decoder's map of ``maps``, labels, a region, often empty or full, and sometimes present slots.

    Raises: only what ``maps`` raises.

    >>> from hypothesis import find
    >>> find(distillation_cases(maps=map_pairs(batch=1)), lambda case: case.region.any()).target.tolist()
    [[[[0]]]]
    """
    logits = draw(map_pairs() if maps is None else maps).dec_logits
    batch, frames, slots, height, width = logits.shape
    slot_mask = draw(st.none() | slot_masks(batch, slots, empty=empty))
    shape = (frames, height, width)
    region = _stack(_clips.mask_clip(seed, shape, plain=False) for seed in draw(_seeds(batch)))
    # labels index the present slots of their clip, modulo their number
    labels = _stack(_clips.label_clip(seed, shape, slots) for seed in draw(_seeds(batch)))
    present = torch.ones(batch, slots, dtype=torch.bool) if slot_mask is None else slot_mask
    # present slots first, in order
    names = present.logical_not().sort(dim=1, stable=True).indices
    counts = present.sum(dim=1).clamp_min(1).view(batch, 1, 1, 1)
    target = names.gather(1, (labels % counts).flatten(1)).view_as(labels)
    return DistillationCase(logits, target, region, slot_mask)


def _seeds(batch: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 2**32 - 1), min_size=batch, max_size=batch)


def _up_to(largest: int) -> st.SearchStrategy[int]:
    # uniform; `integers()` prefers the ends
    return st.sampled_from(range(1, largest + 1))


def _shapes(*largest: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*(_up_to(size) for size in largest))


def _stack(clips: Iterable[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.stack(list(clips)))
