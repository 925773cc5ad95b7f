"""From two maps to what each teaches the other: hard labels, merged slots, two regions. No gradient."""

import torch
from torch import Tensor

from ssync_loss._autocast import no_autocast
from ssync_loss._backends import Backend, resolve_backend
from ssync_loss._blocks import Blocks, indicator
from ssync_loss._checks import check_int, check_number
from ssync_loss._maps import Grid, KindArgument, Maps, prepare_maps
from ssync_loss._types import PseudoLabels
from ssync_loss.merging import overlap_of, representatives, unmerged
from ssync_loss.reference import reference_pseudo_labels
from ssync_loss.regions import count_differing, select_boundary, select_interior


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
        backend: ``"auto"``, ``"torch"`` or ``"reference"`` (slow loops, for checking).

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), pseudo-labeling and transitive merging.

    Raises:
        TypeError, ValueError: on wrong shapes, dtypes or settings; the message names the argument.

    >>> maps = torch.tensor([[3.0, 3.0, 0.0, 0.0], [0.0, 0.0, 3.0, 3.0]]).view(1, 1, 2, 1, 4)
    >>> labels = pseudo_labels(maps, maps)
    >>> labels.enc_labels.flatten().tolist(), labels.boundary.flatten().tolist()
    ([0, 0, 1, 1], [False, True, True, False])
    """
    check_label_settings(merge_threshold, min_different, min_same, max_different)
    backend = resolve_backend(backend)
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
        enc_labels, dec_labels = hard_labels(maps)
        if merge_threshold is None:
            representative = unmerged(maps.enc.shape[0], maps.enc.shape[2], maps.enc.device)
        else:
            overlap = overlap_of(maps.enc, maps.valid, maps.slot_mask)
            area = hard_area(enc_labels, maps.enc.shape[2], maps.valid)
            representative = representatives(overlap, area, merge_threshold)
            enc_labels = rewrite(enc_labels, representative)
            dec_labels = rewrite(dec_labels, representative)
        if maps.valid is not None:
            enc_labels = enc_labels.masked_fill(~maps.valid, 0)
            dec_labels = dec_labels.masked_fill(~maps.valid, 0)
        # both maps at once: on small batches the number of operators counts
        both_valid = None if maps.valid is None else torch.cat([maps.valid, maps.valid])
        enc_count, dec_count = count_differing(torch.cat([enc_labels, dec_labels]), both_valid).chunk(2)
        boundary = select_boundary(enc_count, min_different, min_same, maps.valid)
        interior = select_interior(dec_count, max_different, maps.valid)
    return PseudoLabels(enc_labels.long(), dec_labels.long(), boundary, interior, representative)


def hard_labels(maps: Maps) -> tuple[Tensor, Tensor]:
    """Label every patch of both maps, before merging; an invalid patch may get any label."""
    return (
        first_argmax(maps.enc, maps.enc_peak, maps.slot_mask),
        first_argmax(maps.dec, maps.dec_peak, maps.slot_mask),
    )


def first_argmax(logits: Tensor, peak: Tensor, slot_mask: Tensor | None) -> Tensor:
    """Label every patch with its largest present slot, the first of equals.

    Labels come in the smallest integer type that holds S. On a CPU ``argmax`` over a middle axis takes 25
    times as long as this: the ranks S, S-1, .., 1 of all slots that equal the largest value, and the first of
    those by another maximum.

    Args:
        logits: (B, T, S, H, W).
        peak: (B, T, H, W), the largest logit of the present slots.
        slot_mask: (B, S) bool, or None.
    """
    num_slots = logits.shape[2]
    rank = torch.arange(num_slots, 0, -1, device=logits.device, dtype=logits.dtype)[:, None, None]
    num_clips, num_frames, _, height, width = logits.shape
    labels = torch.empty(
        (num_clips, num_frames, height, width),
        device=logits.device,
        dtype=torch.int8 if num_slots < 128 else torch.int32,
    )
    blocks = Blocks(logits)
    scratch = blocks.scratch(logits, logits.dtype)
    for piece in blocks:
        leads = indicator(torch.eq, logits[piece], peak[piece].unsqueeze(2), scratch).mul_(rank)
        if slot_mask is not None:
            # absent slots may hold anything, the largest value of the present ones too
            leads.mul_(slot_mask[piece[0], None, :, None, None])
        labels[piece] = num_slots - leads.amax(2)
    # NaN equals nothing and ends up at S: any label will do there, if it is one
    return labels.clamp_max_(num_slots - 1)


def hard_area(labels: Tensor, num_slots: int, valid: Tensor | None) -> Tensor:
    """Count the patches of every slot: (B, S) int64."""
    counted = torch.ones((), dtype=torch.int64, device=labels.device).expand(labels.shape)
    if valid is not None:
        counted = valid.long()
    area = torch.zeros(labels.shape[0], num_slots, dtype=torch.int64, device=labels.device)
    return area.scatter_add_(1, labels.flatten(1).long(), counted.flatten(1))


def rewrite(labels: Tensor, representative: Tensor) -> Tensor:
    """Replace every label by its representative: (B, T, H, W), (B, S) -> (B, T, H, W)."""
    merged = representative.gather(1, labels.flatten(1).long())
    return merged.view(labels.shape).to(labels.dtype)
