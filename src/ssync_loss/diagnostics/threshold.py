"""Suggest a merge threshold from a model's maps and features."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssync_loss._autocast import no_autocast
from ssync_loss._axes import Axes
from ssync_loss._checks import check_number, check_type
from ssync_loss.ssync.doubts import warn_of_doubts
from ssync_loss.ssync.fit import place_features, slot_sums
from ssync_loss.ssync.labels import hard_labels
from ssync_loss.ssync.maps import Grid, KindArgument, as_logits, bind_maps
from ssync_loss.ssync.merging import mean_overlap, representatives

NUM_BINS = 20


class SlotStatistics(NamedTuple):
    """Statistics of a batch that decide how slots merge, by :func:`slot_statistics`.

    Attributes:
        overlap: (B, S, S), ``functional.slot_overlap`` of the encoder's map.
        area: (B, S) int64, number of valid patches that a slot wins in the encoder's map.
        present: (B, S) bool, present slots; none in a clip without a valid patch.
        products: (B, S, S) float64, products of the slots' sums of features, which are centered per clip.
        variance: (B,) float64, sum of the squared centered features; NaN if a map or feature is not finite.
    """

    overlap: Tensor
    area: Tensor
    present: Tensor
    products: Tensor
    variance: Tensor


class MergeAdvice(NamedTuple):
    """A merge threshold and its effect, by :func:`suggest_merge_threshold`.

    Attributes:
        threshold: for the criterion's ``merge_threshold``.
        explained: mean over clips of the feature variance that the encoder's hard labels explain.
        merged_explained: the same for its merged labels.
        pairs: (B,) int64, number of pairs of slots that overlap by more than the threshold.
        groups: (B,) int64, number of groups of present slots after merging.
        histogram: (20,) int64, numbers of pairs of present slots by overlap, in equal bins from 0 to 1.
    """

    threshold: float
    explained: float
    merged_explained: float
    pairs: Tensor
    groups: Tensor
    histogram: Tensor


@torch.no_grad()
def slot_statistics(
    enc_logits: Tensor,
    dec_logits: Tensor,
    features: Tensor,
    *,
    kind: KindArgument = "logits",
    grid: Grid = None,
    axes: Axes = None,
    features_axes: str | None = None,
    valid: Tensor | None = None,
    slot_mask: Tensor | None = None,
    num_frames: int | None = None,
) -> SlotStatistics:
    """Measure the statistics that :func:`suggest_merge_threshold` needs; arguments as in :func:`premise`.

    Merging and fit are of the encoder's map. The decoder's map must only be finite.

    Raises: TypeError, ValueError if a dtype, shape or device does not fit.

    >>> features = torch.tensor([0.0, 1.0, 5.0, 6.0]).view(1, 1, 1, 1, 4)
    >>> enc = torch.tensor([[9.0, 0.0, 0.0, 0.0], [8.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0]]).view(1, 1, 3, 1, 4)
    >>> statistics = slot_statistics(enc, enc.clone(), features)
    >>> statistics.overlap[0, 0].tolist(), statistics.area.tolist()  # of the first two slots, one patch in two
    ([1.0, 0.5, 0.0], [[1, 1, 2]])
    """
    masks: dict[str, Any] = {"valid": valid, "slot_mask": slot_mask, "num_frames": num_frames}
    bound = bind_maps(enc_logits, dec_logits, grid=grid, axes=axes, **masks)
    maps = as_logits(bound, kind)
    warn_of_doubts(bound, kind)
    features = place_features(features, features_axes, maps.enc)
    num_slots = maps.enc.shape[2]
    labels = hard_labels(maps)[0].flatten(2)
    counted = torch.ones_like(labels, dtype=torch.bool) if maps.counted is None else maps.counted.flatten(2)
    measured = counted.flatten(1).any(1, keepdim=True)
    member = (F.one_hot(labels, num_slots) * counted.unsqueeze(3)).double()
    area = member.sum((1, 2))
    sums, variance = slot_sums(features, member, counted)
    # subtract the mean
    mean = sums.sum(2, keepdim=True) / area.sum(1).clamp_min(1)[:, None, None]
    variance = variance - area.sum(1) * mean.square().sum((1, 2))
    sums = sums - area.unsqueeze(1) * mean
    with no_autocast(maps.enc):
        overlap = mean_overlap(maps.enc.to(maps.dtype), maps.counted, maps.slot_mask)
    return SlotStatistics(
        overlap=overlap,
        area=area.long(),
        present=measured.expand(-1, num_slots) if maps.slot_mask is None else maps.slot_mask & measured,
        products=sums.mT @ sums,
        variance=variance * maps.spoil(),
    )


@torch.no_grad()
def suggest_merge_threshold(statistics: Iterable[SlotStatistics], *, keep: float = 0.95) -> MergeAdvice:
    """Suggest the lowest merge threshold at which merging loses little of the explained variance.

    At this threshold the encoder's merged labels explain at least ``keep`` of the variance that its unmerged labels
    explain, both as means over clips of :func:`explained_variance`. A lower threshold merges more and never explains
    more, so there is one. All thresholds between two overlaps that occur merge the same slots; the middle is taken. If
    nothing is explained (constant features, one slot in use, no clip), it is 1, which merges nothing.

    This is a rule of thumb. ``examples/study.py`` tried it with one seed, and it was never the best: it suggested 0.62
    where 0.6 was the best of 0.6, 0.75 and 0.9, and 0.71 and 0.67 where 0.6 was the worst. The published ones are 0.6,
    0.65, 0.7 and 0.9, see ``SSyncLoss.from_preset``, and ``keep=0.95`` is not tuned.
    ``visualize.histogram`` draws the histogram; a threshold in a gap is safe. Take clips of many videos, and a model
    trained with its own losses.

    Args:
        statistics: of the batches of an evaluation set, by :func:`slot_statistics`. They are read on the host.
        keep: share of the explained variance to keep, within [0, 1].

    Returns: the threshold and its effect; tensors are on the CPU.

    Raises: TypeError if an element is no SlotStatistics; ValueError if there is none, if maps or features of a clip
        were not finite, or ``keep`` is out of range.

    >>> features = torch.tensor([0.0, 1.0, 5.0, 6.0]).view(1, 1, 1, 1, 4)
    >>> enc = torch.tensor([[9.0, 0.0, 0.0, 0.0], [8.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0]]).view(1, 1, 3, 1, 4)
    >>> advice = suggest_merge_threshold([slot_statistics(enc, enc.clone(), features)])
    >>> advice.threshold, advice.groups.tolist()  # overlaps are 0 and 0.5: the middle
    (0.25, [2])
    >>> round(advice.explained, 4), round(advice.merged_explained, 4)  # 25.5/26, and 25/26: 98 % of it
    (0.9808, 0.9615)
    """
    check_number("keep", keep, 0.0, 1.0)
    parts = tuple(statistics)
    if not parts:
        raise ValueError("`statistics` must hold those of at least one batch; got none.")
    for part in parts:
        check_type("statistics", part, SlotStatistics)
    parts = tuple(SlotStatistics(*(one.cpu() for one in part)) for part in parts)
    if not all(bool(part.variance.isfinite().all()) for part in parts):
        raise ValueError("`statistics` must be of finite maps and features; got NaN or infinities.")
    overlaps = torch.cat([part.overlap[_pairs(part)] for part in parts])
    # a threshold merges larger overlaps: 0 merges all pairs that overlap, the largest overlap merges none
    levels = torch.cat([overlaps, overlaps.new_zeros(1)]).unique()
    wanted = keep * (explained := _explained(parts, None))
    threshold = 1.0
    if explained > 0:
        low, high = 0, len(levels) - 1
        while low < high:
            middle = (low + high) // 2
            enough = _explained(parts, levels[middle].item()) >= wanted
            low, high = (low, middle) if enough else (middle + 1, high)
        above = levels[low + 1].item() if low + 1 < len(levels) else 1.0
        threshold = (levels[low].item() + above) / 2
    groups = []
    for part in parts:
        slots = torch.arange(part.overlap.shape[1])
        groups.append((part.present & (representatives(part.overlap, part.area, threshold) == slots)).sum(1))
    return MergeAdvice(
        threshold,
        explained,
        _explained(parts, threshold),
        pairs=torch.cat([(_pairs(part) & (part.overlap > threshold)).sum((1, 2)) for part in parts]),
        groups=torch.cat(groups),
        histogram=torch.bincount((overlaps * NUM_BINS).long().clamp_max(NUM_BINS - 1), minlength=NUM_BINS),
    )


def _pairs(part: SlotStatistics) -> Tensor:
    """Return the pairs i < j of present slots: (B, S, S) bool."""
    return (part.present.unsqueeze(1) & part.present.unsqueeze(2)).triu(1)


def _explained(parts: Iterable[SlotStatistics], threshold: float | None) -> float:
    """Return the mean over clips of the variance that labels explain, merged at a threshold."""
    shares = []
    for part in parts:
        slots = torch.arange(part.overlap.shape[1])
        group = slots.expand_as(part.area)
        if threshold is not None:
            group = representatives(part.overlap, part.area, threshold)
        joined = (group.unsqueeze(2) == slots).double()
        area = (part.area.double().unsqueeze(1) @ joined).squeeze(1)
        between = ((joined.mT @ part.products @ joined).diagonal(dim1=1, dim2=2) / area.clamp_min(1)).sum(1)
        # one slot explains exactly 0, whatever rounding leaves
        between = between.masked_fill((area > 0).sum(1) < 2, 0.0)
        shares.append(between / torch.where(part.variance == 0, 1.0, part.variance))
    whole = torch.cat(shares)
    return whole.sum().item() / max(len(whole), 1)
