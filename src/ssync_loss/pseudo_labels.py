"""From two maps to what each teaches the other: hard labels, merged slots, two regions. No gradient."""

from typing import NamedTuple

import torch
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
    with no_autocast(maps.enc):
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
        labels: (2, B, T, H, W) int8, or int32 for more than 128 slots: the merged labels of encoder and decoder.
        regions: (2, B, T, H, W) uint8, 1 in the boundary and the interior, and 0 elsewhere.
        representative: (B, S) int64.
        peaks: (2, B, T, H, W), the largest logit of a present slot of every patch, at least the lowest finite number,
            of decoder and encoder: the maps that are taught the labels, in this order.
    """

    labels: Tensor
    regions: Tensor
    representative: Tensor
    peaks: Tensor

    def as_pseudo_labels(self) -> PseudoLabels:
        """Return what :func:`pseudo_labels` returns, to write into: a step keeps the bytes for its backward."""
        enc_labels, dec_labels = self.labels.long().unbind()
        boundary, interior = as_bool(self.regions.clone()).unbind()
        return PseudoLabels(enc_labels, dec_labels, boundary, interior, self.representative.clone())


def find_labels(
    maps: Maps,
    blocks: Blocks,
    *,
    merge_threshold: float | None,
    min_different: int,
    min_same: int,
    max_different: int,
) -> Found:
    """Compute :func:`pseudo_labels` by operators of torch, with no autocast around them."""
    B, _, S, _, _ = maps.enc.shape
    valid = maps.counted
    narrow = torch.int8 if S <= 128 else torch.int32
    labels, peaks, both = _read(maps, blocks, with_activity=merge_threshold is not None)
    if both is None or merge_threshold is None:
        representative = unmerged(B, S, labels.device)
    else:
        area = hard_area(labels[0], S, valid)
        representative = representatives(mean_overlap(both, valid), area, merge_threshold)
        labels = representative.to(narrow).expand(2, B, S).gather(2, labels.flatten(2)).view(labels.shape)
    labels = labels.to(narrow)
    if valid is not None:
        labels = labels.masked_fill(~valid, 0)
    regions = select_regions(labels, valid, min_different, min_same, max_different)
    return Found(labels, regions, representative, peaks)


def hard_labels(maps: Maps) -> tuple[Tensor, Tensor]:
    """Label every patch of both maps, before merging; an invalid patch may get any label."""
    enc_labels, dec_labels = _read(maps, Blocks(maps.enc, maps.dtype), with_activity=False)[0].unbind()
    return enc_labels, dec_labels


def _read(maps: Maps, blocks: Blocks, *, with_activity: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take from the maps, while a group of clips is in the cache, all that labels are made of.

    Shape:
        Returns the unmerged labels (2, B, T, H, W) int64, :attr:`Found.peaks`, and how many patches two slots of
        the encoder are active on together (B, T, S, S), if that is wanted.
    """
    B, T, _, H, W = maps.enc.shape
    labels = torch.empty(2, B, T, H, W, device=maps.enc.device, dtype=torch.int64)
    peaks = torch.empty(2, B, T, H, W, device=maps.enc.device, dtype=maps.dtype)
    both = []
    # no `unbind`: a compiler cannot have its outputs written to for batches of any size
    of_groups = blocks.groups(labels[0], labels[1], peaks[0], peaks[1])
    for some, (enc_slots, dec_slots, dec_peaks, enc_peaks) in zip(maps.in_groups(blocks), of_groups, strict=True):
        for logits, slots, peak in ((some.enc, enc_slots, enc_peaks), (some.dec, dec_slots, dec_peaks)):
            write_first_largest(only_present(logits, some.slot_mask), slots, peak)
            if some.slot_mask is not None:
                # where no present slot has more than -inf, an absent one may have come first
                first = some.slot_mask.to(torch.uint8).argmax(1)[:, None, None, None]
                slots.copy_(torch.where(peak == float("-inf"), first, slots))
            if with_activity and slots is enc_slots:
                both.append(active_together(logits, some.valid, some.slot_mask, blocks))
    return labels, peaks.clamp_min_(torch.finfo(peaks.dtype).min), in_one(both) if with_activity else None


def write_first_largest(logits: Tensor, slots: Tensor, peaks: Tensor) -> None:
    """Find the first slot with the largest logit of every patch, and that logit.

    On a CPU ``argmax`` over a middle axis takes eighty times as long as to pool a window of all slots, of patches
    that are channels and last in memory.

    Shape:
        logits: (B, T, S, H, W). slots: (B, T, H, W) int64, written to; any where nothing is largest, for NaN. peaks:
        (B, T, H, W), written to; NaN if one of the slots is.
    """
    B, T, S, H, W = logits.shape
    if torch.compiler.is_compiling():
        # for the CPU's compiler `argmax` is scalar: the first is the largest of the ranks S - 1, S - 2, .., 0 of all
        # slots that equal the largest
        torch.amax(logits, 2, out=peaks)
        rank = torch.arange(S - 1, -1, -1, device=logits.device, dtype=logits.dtype)[:, None, None]
        slots.copy_(S - 1 - (indicator(torch.eq, logits, peaks.unsqueeze(2)) * rank).amax(2))
    elif logits.device.type != "cpu":
        torch.argmax(logits, 2, out=slots)
        torch.amax(logits, 2, out=peaks)
    else:
        channels, one_each = logits.reshape(B * T, S, 1, H * W).permute(0, 3, 1, 2), (B * T, H * W, 1, 1)
        torch.ops.aten.max_pool2d_with_indices.out(
            channels, [S, 1], out=peaks.view(one_each), indices=slots.view(one_each)
        )


def largest_of(peaks: Tensor, valid: Tensor | None) -> Tensor:
    """Return the largest of the valid patches' largest logits, or 0 beside invalid ones; NaN if one is: a scalar."""
    if peaks.numel() == 0:
        return peaks.new_zeros(())
    return (peaks if valid is None else torch.where(valid, peaks, 0.0)).amax()


def hard_area(labels: Tensor, num_slots: int, valid: Tensor | None) -> Tensor:
    """Count the patches of every slot: (B, S) int32."""
    labels = labels.flatten(1)
    area = labels.new_zeros(labels.shape[0], num_slots, dtype=torch.int32)
    counted = torch.ones_like(labels, dtype=area.dtype) if valid is None else valid.flatten(1).to(area.dtype)
    return area.scatter_add_(1, labels, counted)
