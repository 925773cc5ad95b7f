"""Select clips whose labels do not depend on rounding or ties, and write NaN into cells that must not matter."""

import math

import torch
from torch import Tensor

from ssync_loss.ssync.reference import reference_hard_labels, reference_pseudo_labels, reference_slot_overlap

MEAN_MARGIN = 1e-5
OVERLAP_MARGIN = 1e-6


def decidable_clips(
    enc_logits: Tensor,
    *,
    merge_threshold: float | None,
    valid: Tensor | None = None,
    slot_mask: Tensor | None = None,
    dyadic: bool = False,
) -> Tensor:
    """Mark the clips in which merging does not depend on rounding.

    Two correct implementations must give the same labels if every valid logit of a present slot has
    ``|logit - mean| > 1e-5 * max(1, |mean|)`` and every overlap ``|IoU - threshold| > 1e-6``. Overlaps of 0 and 1 are
    always exact. Without a threshold every clip is decidable. ``dyadic`` logits are multiples of one power of two that
    is not too small, like those of :func:`map_pairs`. Their means are exact, and only overlaps need a margin.

    Shape: enc_logits: (B, T, S, H, W), valid: (B, T) or (B, T, H, W), slot_mask: (B, S). Returns (B,), bool.

    Raises: as :func:`reference_slot_overlap`; without a threshold nothing is checked.

    >>> logits = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]).view(1, 1, 2, 1, 4)
    >>> [decidable_clips(logits, merge_threshold=threshold).item() for threshold in (0.6, 0.5)]
    [True, False]
    """
    if merge_threshold is None:
        return torch.ones(len(enc_logits), dtype=torch.bool)
    logits = enc_logits.detach().double()
    overlap = reference_slot_overlap(logits, valid=valid, slot_mask=slot_mask)
    exact = (overlap == 0) | (overlap == 1) | torch.eye(enc_logits.shape[2], dtype=torch.bool, device=overlap.device)
    clear = (exact | ((overlap - merge_threshold).abs() > OVERLAP_MARGIN)).all(dim=2).all(dim=1)
    if dyadic:
        return clear
    seen = _seen(logits, valid, slot_mask)
    count = seen.sum((1, 3, 4), keepdim=True)
    mean = torch.where(seen, logits, 0.0).sum((1, 3, 4), keepdim=True) / count.clamp_min(1)
    # a comparison with a mean of -inf needs no rounding
    near = seen & mean.isfinite() & ((logits - mean).abs() <= MEAN_MARGIN * mean.abs().clamp_min(1))
    return clear & ~near.flatten(1).any(1)


def untied_clips(
    enc_logits: Tensor,
    dec_logits: Tensor,
    *,
    merge_threshold: float | None,
    valid: Tensor | None = None,
    slot_mask: Tensor | None = None,
) -> Tensor:
    """Mark the clips in which the order of the slots does not matter.

    In these clips every valid patch of both maps has one strongest present slot, and every group of merged slots has
    one member with the largest area. Renaming the slots thus only renames the labels.

    Shape: enc_logits, dec_logits: (B, T, S, H, W), valid: (B, T) or (B, T, H, W), slot_mask: (B, S). Returns (B,),
        bool.

    Raises: as :func:`reference_pseudo_labels`.

    >>> logits = torch.tensor([[2.0, 2.0], [2.0, 1.0]]).view(2, 1, 2, 1, 1)
    >>> untied_clips(logits, logits, merge_threshold=None).tolist()
    [False, True]
    """
    merged = reference_pseudo_labels(
        enc_logits, dec_logits, merge_threshold=merge_threshold, valid=valid, slot_mask=slot_mask
    )
    seen = _seen(enc_logits, valid, slot_mask)
    untied = torch.ones(len(enc_logits), dtype=torch.bool)
    for logits in (enc_logits, dec_logits):
        strongest = logits.masked_fill(~seen, -math.inf).amax(2, keepdim=True)
        winners = (seen & (logits == strongest)).sum(2)
        untied &= ((winners == 1) | ~seen.any(2)).flatten(1).all(1)
    labels = reference_hard_labels(enc_logits, valid=valid, slot_mask=slot_mask)
    slots = torch.arange(enc_logits.shape[2])
    area = (seen & (labels.unsqueeze(2) == slots.view(-1, 1, 1))).sum((1, 3, 4))
    rivals = (merged.representative != slots) & (area == area.gather(1, merged.representative))
    return untied & ~rivals.any(1)


def poison(
    logits: Tensor, *, valid: Tensor | None = None, slot_mask: Tensor | None = None, value: float = math.nan
) -> Tensor:
    """Return a copy with ``value`` in every invalid patch and absent slot; results must not depend on these.

    Shape: logits: (B, T, S, H, W), valid: (B, T) or (B, T, H, W), slot_mask: (B, S). Returns (B, T, S, H, W).

    Raises: nothing of its own; arguments are not checked.

    >>> poison(torch.zeros(1, 2, 1, 1, 1), valid=torch.tensor([[True, False]])).flatten().tolist()
    [0.0, nan]
    """
    return torch.where(_seen(logits, valid, slot_mask), logits, value)


def _seen(logits: Tensor, valid: Tensor | None, slot_mask: Tensor | None) -> Tensor:
    seen = torch.ones_like(logits, dtype=torch.bool)
    if valid is not None:
        seen &= (valid if valid.ndim == 4 else valid[:, :, None, None])[:, :, None]
    return seen if slot_mask is None else seen & slot_mask[:, None, :, None, None]
