"""Pseudo-labels in plain torch: hard labels, merged slots, two regions. Nothing here has a gradient."""

import torch
from torch import Tensor

from ssync_loss._forks import take_one_thread_if_forked
from ssync_loss.ssync.maps import Maps, first_largest, only_present
from ssync_loss.ssync.merging import mean_overlap, representatives, unmerged
from ssync_loss.ssync.regions import select_boundary, select_interior
from ssync_loss.ssync.settings import Settings
from ssync_loss.ssync.types import PseudoLabels, SlotLabels


@torch.no_grad()
def find_labels(maps: Maps, settings: Settings) -> PseudoLabels:
    """Compute :func:`ssync_loss.functional.pseudo_labels` without checks."""
    hard = torch.stack(hard_labels(maps))
    return merge_labels(hard, _representative(maps, hard[0], settings), maps, settings)


@torch.no_grad()
def find_slots(maps: Maps, settings: Settings) -> SlotLabels:
    """Compute labels before merging, and representatives."""
    hard = torch.stack(hard_labels(maps))
    return SlotLabels(hard, _representative(maps, hard[0], settings), maps.is_clean())


def merge_labels(hard: Tensor, representative: Tensor, maps: Maps, settings: Settings) -> PseudoLabels:
    """Merge the labels of both maps, (2, B, T, H, W), and select the regions."""
    valid = maps.counted
    enc_labels, dec_labels = (representative.gather(1, labels.flatten(1)).view_as(labels) for labels in hard)
    if valid is not None:
        enc_labels, dec_labels = enc_labels.masked_fill(~valid, 0), dec_labels.masked_fill(~valid, 0)
    return PseudoLabels(
        enc_labels,
        dec_labels,
        boundary=select_boundary(enc_labels, valid, settings.min_different, settings.min_same),
        interior=select_interior(dec_labels, valid, settings.max_different),
        representative=representative,
    )


def hard_labels(maps: Maps) -> tuple[Tensor, Tensor]:
    """Label every patch of both maps, before merging: (B, T, H, W) int64. An invalid patch may get any label."""
    take_one_thread_if_forked(maps.enc.device.type)
    return _largest_slot(maps.enc, maps.slot_mask), _largest_slot(maps.dec, maps.slot_mask)


def _largest_slot(logits: Tensor, slot_mask: Tensor | None) -> Tensor:
    """Return the first present slot with the largest logit."""
    scores = only_present(logits, slot_mask)
    labels = first_largest(scores)
    if slot_mask is None:
        return labels
    # if all present slots are at -inf, an absent slot may come first
    first = slot_mask.to(torch.uint8).argmax(1)[:, None, None, None]
    return torch.where(scores.amax(2) == float("-inf"), first, labels)


def _representative(maps: Maps, enc_labels: Tensor, settings: Settings) -> Tensor:
    """Return the representative of every slot, (B, S)."""
    num_clips, _, num_slots = maps.enc.shape[:3]
    if settings.merge_threshold is None:
        return unmerged(num_clips, num_slots, maps.enc.device)
    valid = maps.counted
    counted = torch.ones_like(enc_labels) if valid is None else valid.long()
    area = enc_labels.new_zeros(num_clips, num_slots).scatter_add(1, enc_labels.flatten(1), counted.flatten(1))
    overlap = mean_overlap(maps.enc.to(maps.dtype), valid, maps.slot_mask)
    return representatives(overlap, area, settings.merge_threshold)
