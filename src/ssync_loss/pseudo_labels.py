"""From two maps to what each teaches the other: hard labels, merged slots, two regions. No gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from ssync_loss import kernels
from ssync_loss._autocast import no_autocast
from ssync_loss._backends import Backend, check_backend, resolve_backend
from ssync_loss._blocks import Blocks, frames_of, indicator
from ssync_loss._checks import check_int, check_number
from ssync_loss._maps import Grid, KindArgument, Maps, peak_of, prepare_maps
from ssync_loss._types import PseudoLabels
from ssync_loss.merging import overlap_of, representatives, unmerged
from ssync_loss.reference.ssync import reference_pseudo_labels
from ssync_loss.regions import count_differing, select_regions


def pseudo_labels(
    enc_logits: Tensor,
    dec_logits: Tensor,
    *,
    merge_threshold: float | None = 0.6,
    min_different: int = 1,
    min_same: int = 1,
    max_different: int = 0,
    kind: KindArgument = "logits",
    grid: Grid = None,
    valid: Tensor | None = None,
    slot_mask: Tensor | None = None,
    backend: Backend = "auto",
) -> PseudoLabels:
    """Compute the targets and regions of both SSync losses, in time linear in the patches.

    ``e = argmax_s enc``, ``d = argmax_s dec`` (first index on ties); slots whose activations overlap by more
    than ``merge_threshold`` are merged transitively (:func:`slot_overlap`, :func:`merge_slots`, with the hard
    area of ``e``), and both label maps are rewritten with the representatives. ``boundary`` comes from the
    merged ``e``, ``interior`` from the merged ``d`` (:func:`boundary_region`, :func:`interior_region`).

    Shape:
        enc_logits: (B, T, S, H, W) or (B, T, S, N). dec_logits: the same, on any grid.

    Args:
        enc_logits: slot-attention logits of the last iteration of every frame, before the softmax over slots.
        dec_logits: alpha logits of the decoder, before the softmax over slots.
        merge_threshold: within [0, 1]; None turns merging off.
        min_different: differing neighbors, of ten, that make a boundary.
        min_same: agreeing neighbors without which a patch is noise.
        max_different: differing neighbors allowed in an interior.
        kind: ``"logits"`` or ``"probs"``, or a pair for encoder and decoder. Probabilities of the encoder are
            compared with their mean as log p: a *different* merging rule, which wants its own threshold.
        grid: (H, W) of (B, T, S, N) maps, or a pair of grids for encoder and decoder.
        valid: (B, T) or (B, T, H, W) bool: patches that count, on the encoder's grid.
        slot_mask: (B, S) bool: slots that are present.
        backend: what computes, see :class:`ssync_loss.SSyncLoss`.

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), pseudo-labeling and transitive merging.

    Raises:
        TypeError, ValueError: on wrong shapes, dtypes or settings; the message names the argument.

    >>> maps = torch.tensor([[3.0, 3.0, 0.0, 0.0], [0.0, 0.0, 3.0, 3.0]]).view(1, 1, 2, 1, 4)
    >>> labels = pseudo_labels(maps, maps)
    >>> labels.enc_labels.flatten().tolist(), labels.boundary.flatten().tolist()
    ([0, 0, 1, 1], [False, True, True, False])
    """
    check_label_settings(merge_threshold, min_different, min_same, max_different)
    check_backend(backend)
    with torch.no_grad():
        maps = prepare_maps(enc_logits, dec_logits, kind=kind, grid=grid, valid=valid, slot_mask=slot_mask)
        return labels_of(
            maps,
            merge_threshold=merge_threshold,
            min_different=min_different,
            min_same=min_same,
            max_different=max_different,
            backend=backend,
        )


def check_label_settings(
    merge_threshold: object, min_different: object, min_same: object, max_different: object
) -> None:
    """Check what :func:`pseudo_labels` and the modules are configured with."""
    if merge_threshold is not None:
        check_number("merge_threshold", merge_threshold, 0.0, 1.0)
    check_int("min_different", min_different, 0, 10)
    check_int("min_same", min_same, 0, 10)
    check_int("max_different", max_different, 0, 10)


@torch.no_grad()
def labels_of(
    maps: Maps,
    *,
    merge_threshold: float | None,
    min_different: int,
    min_same: int,
    max_different: int,
    backend: Backend,
) -> PseudoLabels:
    """Compute :func:`pseudo_labels` from maps that are prepared already."""
    backend = resolve_backend(backend, maps.enc, maps.dec)
    if backend == "triton":
        return kernels.pseudo_labels(
            maps.enc,
            maps.dec,
            valid=maps.valid,
            slot_mask=maps.slot_mask,
            merge_threshold=merge_threshold,
            min_different=min_different,
            min_same=min_same,
            max_different=max_different,
        )
    if backend == "reference":
        return reference_pseudo_labels(
            maps.enc,
            maps.dec,
            merge_threshold=merge_threshold,
            min_different=min_different,
            min_same=min_same,
            max_different=max_different,
            valid=maps.valid,
            slot_mask=maps.slot_mask,
        )
    blocks = Blocks(maps.enc, maps.dtype)
    groups = [
        labels_of_clips(
            maps.of_clips(group),
            blocks,
            merge_threshold=merge_threshold,
            min_different=min_different,
            min_same=min_same,
            max_different=max_different,
        ).found
        for group in blocks.groups
    ]
    return joined(groups)


class Found(NamedTuple):
    """The labels of clips that go together.

    Attributes:
        labels: (2, B, T, H, W) int64, the merged labels of encoder and decoder.
        regions: (2, B, T, H, W) bool, boundary and interior.
        representative: (B, S) int64.
    """

    labels: Tensor
    regions: Tensor
    representative: Tensor


class ClipLabels(NamedTuple):
    """Labels of clips that go together, and what finding them has shown.

    Attributes:
        found: the labels.
        narrow: the merged labels as int8, or int32 for more than 128 slots.
        peaks: (2, B, T, H, W), the largest logits of the present slots, encoder and decoder; -inf where none is.
        top: scalar, the largest of the valid patches, at least 0; NaN if one is.
    """

    found: Found
    narrow: Tensor
    peaks: Tensor
    top: Tensor


def labels_of_clips(
    maps: Maps,
    blocks: Blocks,
    *,
    merge_threshold: float | None,
    min_different: int,
    min_same: int,
    max_different: int,
) -> ClipLabels:
    """Compute :func:`pseudo_labels` of clips that go together."""
    B, _, S, _, _ = maps.enc.shape
    labels, peaks = first_largest(maps, blocks)
    if merge_threshold is None:
        representative = unmerged(B, S, labels.device)
    else:
        with no_autocast(maps.enc):
            overlap = overlap_of(maps.enc, maps.valid, maps.slot_mask, blocks)
            area = hard_area(labels[0], S, maps.valid)
            representative = representatives(overlap, area, merge_threshold)
        labels = representative.expand(2, B, S).gather(2, labels.flatten(2)).view(labels.shape)
    both_valid = None
    if maps.valid is not None:
        labels = labels.masked_fill(~maps.valid, 0)
        both_valid = maps.valid.expand(labels.shape).flatten(0, 1)
    narrow = labels.to(torch.int8 if S <= 128 else torch.int32)
    regions = select_regions(
        *count_differing(narrow.flatten(0, 1), both_valid).chunk(2),
        min_different=min_different,
        min_same=min_same,
        max_different=max_different,
        valid=maps.valid,
    )
    return ClipLabels(Found(labels, regions, representative), narrow, peaks, top_of(peaks, maps.valid))


def joined(groups: list[Found]) -> PseudoLabels:
    """Put the labels of groups of clips together."""
    enc_labels, dec_labels = torch.cat([one.labels for one in groups], 1).unbind()
    boundary, interior = torch.cat([one.regions for one in groups], 1).unbind()
    representative = torch.cat([one.representative for one in groups])
    return PseudoLabels(enc_labels, dec_labels, boundary, interior, representative)


def hard_labels(maps: Maps) -> tuple[Tensor, Tensor]:
    """Label every patch of both maps, before merging; an invalid patch may get any label."""
    blocks = Blocks(maps.enc, maps.dtype)
    labels = [first_largest(maps.of_clips(group), blocks)[0] for group in blocks.groups]
    enc_labels, dec_labels = torch.cat(labels, 1).unbind()
    return enc_labels, dec_labels


def first_largest(maps: Maps, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Find the first slot with the largest logit of the present ones, of every patch of both maps, and that logit.

    On a CPU ``argmax`` over a middle axis takes 25 times as long as this: the ranks S - 1, S - 2, .., 0 of all slots
    that equal the largest value, and the first of those by another maximum.

    Shape:
        Returns slots (2, B, T, H, W) int64, encoder and decoder, any where nothing is largest, for NaN; and the
        largest logits (2, B, T, H, W), NaN if one of the slots is.
    """
    B, T, S, H, W = maps.enc.shape
    # both maps in one tensor: on small batches the number of operators counts
    peaks = maps.enc.new_empty(2, B, T, H, W)
    ranks = torch.empty_like(peaks)
    rank = torch.arange(S - 1, -1, -1, device=peaks.device, dtype=peaks.dtype)[:, None, None]
    for k, logits in enumerate((maps.enc, maps.dec)):
        for frames in blocks.frames:
            some, peak, best = frames_of(frames, logits, peaks[k], ranks[k])
            peak_of(some, maps.slot_mask, out=peak)
            leads = indicator(torch.eq, some, peak.unsqueeze(2), blocks.scratch(some)).mul_(rank)
            if maps.slot_mask is not None:
                # absent slots may hold anything, the largest value of the present ones too
                leads.mul_(maps.slot_mask[:, None, :, None, None])
            torch.amax(leads, 2, out=best)
    return (S - 1 - ranks).long(), peaks


def top_of(peaks: Tensor, valid: Tensor | None) -> Tensor:
    """Return the largest of the valid patches' largest logits, or 0 if none is above it; NaN if one is."""
    if peaks.numel() == 0:
        return peaks.new_zeros(())
    if valid is not None:
        peaks = torch.where(valid, peaks, 0.0)
    return peaks.amax().clamp_min(0.0)


def hard_area(labels: Tensor, num_slots: int, valid: Tensor | None) -> Tensor:
    """Count the patches of every slot: (B, S) int64."""
    counted = torch.ones((), dtype=torch.int64, device=labels.device).expand(labels.shape)
    if valid is not None:
        counted = valid.long()
    area = torch.zeros(labels.shape[0], num_slots, dtype=torch.int64, device=labels.device)
    return area.scatter_add_(1, labels.flatten(1), counted.flatten(1))
