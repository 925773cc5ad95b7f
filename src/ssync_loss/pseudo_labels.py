"""From two maps to what each teaches the other: hard labels, merged slots, two regions. No gradient."""

from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssync_loss import kernels
from ssync_loss._autocast import no_autocast
from ssync_loss._backends import Backend, check_backend, resolve_backend
from ssync_loss._blocks import Blocks, in_one, indicator
from ssync_loss._checks import check_int, check_number
from ssync_loss._maps import Grid, KindArgument, Maps, only_present, prepare_maps
from ssync_loss._types import PseudoLabels
from ssync_loss.merging import active_together, mean_overlap, representatives, unmerged
from ssync_loss.reference.ssync import reference_pseudo_labels
from ssync_loss.regions import as_bool, select_regions


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
    found = find_labels(
        maps,
        Blocks(maps.enc, maps.dtype),
        merge_threshold=merge_threshold,
        min_different=min_different,
        min_same=min_same,
        max_different=max_different,
    )
    return found.as_pseudo_labels()


class Found(NamedTuple):
    """Labels, and what finding them has shown.

    Attributes:
        labels: (2, B, T, H, W) int64, the merged labels of encoder and decoder.
        narrow: the same as int8, or int32 for more than 128 slots.
        regions: (2, B, T, H, W) uint8, 1 in the boundary and the interior, and 0 elsewhere.
        representative: (B, S) int64.
        top: scalar, the largest logit of valid patches and present slots in both maps, at least 0; NaN if one is.
    """

    labels: Tensor
    narrow: Tensor
    regions: Tensor
    representative: Tensor
    top: Tensor

    def as_pseudo_labels(self) -> PseudoLabels:
        """Return what :func:`pseudo_labels` returns, to write into: a step keeps the bytes for its backward."""
        enc_labels, dec_labels = self.labels.unbind()
        boundary, interior = as_bool(self.regions.clone()).unbind()
        return PseudoLabels(enc_labels, dec_labels, boundary, interior, self.representative)


def find_labels(
    maps: Maps,
    blocks: Blocks,
    *,
    merge_threshold: float | None,
    min_different: int,
    min_same: int,
    max_different: int,
) -> Found:
    """Compute :func:`pseudo_labels` by operators of torch."""
    B, _, S, _, _ = maps.enc.shape
    valid = maps.counted
    with no_autocast(maps.enc):
        labels, top, both = _read(maps, blocks, with_activity=merge_threshold is not None)
        if both is None or merge_threshold is None:
            representative = unmerged(B, S, labels.device)
        else:
            area = hard_area(labels[0], S, valid)
            representative = representatives(mean_overlap(both, valid), area, merge_threshold)
            labels = representative.expand(2, B, S).gather(2, labels.flatten(2)).view(labels.shape)
    if valid is not None:
        labels = labels.masked_fill(~valid, 0)
    narrow = labels.to(torch.int8 if S <= 128 else torch.int32)
    regions = select_regions(narrow, valid, min_different, min_same, max_different)
    return Found(labels, narrow, regions, representative, top)


def hard_labels(maps: Maps) -> tuple[Tensor, Tensor]:
    """Label every patch of both maps, before merging; an invalid patch may get any label."""
    enc_labels, dec_labels = _read(maps, Blocks(maps.enc, maps.dtype), with_activity=False)[0].unbind()
    return enc_labels, dec_labels


def _read(maps: Maps, blocks: Blocks, *, with_activity: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take from the maps, while a group of clips is in the cache, all that labels are made of.

    Shape:
        Returns the unmerged labels (2, B, T, H, W) int64, :attr:`Found.top`, and how many patches two slots of the
        encoder are active on together (B, T, S, S), if that is wanted.
    """
    B, T, _, H, W = maps.enc.shape
    labels: tuple[list[Tensor], list[Tensor]] = [], []
    tops, both = [], []
    for group in blocks.groups:
        some = maps.of_clips(group)
        for logits, found in zip((some.enc, some.dec), labels, strict=True):
            slots, peak = first_largest(only_present(logits, some.slot_mask))
            if some.slot_mask is not None:
                # where no present slot has more than -inf, an absent one may have come first
                first = some.slot_mask.to(torch.uint8).argmax(1)[:, None, None, None]
                slots = torch.where(peak == float("-inf"), first, slots)
            found.append(slots)
            tops.append(largest_of(peak, some.valid))
        if with_activity:
            both.append(active_together(some.enc, some.valid, some.slot_mask, blocks))
    enc_labels, dec_labels = labels
    top = reduce(torch.maximum, tops).clamp_min(0.0)
    return torch.cat(enc_labels + dec_labels).view(2, B, T, H, W), top, in_one(both) if with_activity else None


def first_largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Find the first slot with the largest logit of every patch, and that logit.

    On a CPU ``argmax`` over a middle axis takes eighty times as long as to pool a window of all slots, of patches
    that are channels and last in memory.

    Shape:
        logits: (B, T, S, H, W). Returns slots (B, T, H, W) int64, any where nothing is largest, for NaN; and the
        largest logits (B, T, H, W), NaN if one of the slots is.
    """
    B, T, S, H, W = logits.shape
    if torch.compiler.is_compiling():
        # for the CPU's compiler `argmax` is scalar: the first is the largest of the ranks S - 1, S - 2, .., 0 of all
        # slots that equal the largest
        peaks = logits.amax(2)
        rank = torch.arange(S - 1, -1, -1, device=logits.device, dtype=logits.dtype)[:, None, None]
        return (S - 1 - (indicator(torch.eq, logits, peaks.unsqueeze(2)) * rank).amax(2)).long(), peaks
    if logits.device.type != "cpu":
        return logits.argmax(2), logits.amax(2)
    rows = logits.reshape(B * T, S, 1, H * W).permute(0, 3, 1, 2)
    peaks, slots = F.max_pool2d(rows, (S, 1), return_indices=True)
    return slots.view(B, T, H, W), peaks.view(B, T, H, W)


def largest_of(peaks: Tensor, valid: Tensor | None) -> Tensor:
    """Return the largest of the valid patches' largest logits, or 0 beside invalid ones; NaN if one is: a scalar."""
    if peaks.numel() == 0:
        return peaks.new_zeros(())
    return (peaks if valid is None else torch.where(valid, peaks, 0.0)).amax()


def hard_area(labels: Tensor, num_slots: int, valid: Tensor | None) -> Tensor:
    """Count the patches of every slot: (B, S) int64."""
    labels = labels.flatten(1)
    counted = labels.new_ones(()).expand_as(labels) if valid is None else valid.flatten(1).long()
    return labels.new_zeros(labels.shape[0], num_slots).scatter_add_(1, labels, counted)
