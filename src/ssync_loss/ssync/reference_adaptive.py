"""The adaptive loss in loops, for tests and for readers. It uses only :mod:`ssync_loss.ssync.reference`."""

from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssync_loss.ssync.reference import reference_hard_labels, reference_pseudo_labels, reference_ssync


class ReferenceAdaptiveState(NamedTuple):
    """Running means of both margins, not debiased, and the number of questions."""

    margin: float = 0.0
    merged_margin: float = 0.0
    questions: int = 0


def reference_explained(points: Tensor, names: list[int]) -> float:
    """Return the share of the variance of points (N, D) that a partition explains: the points' ``names``.

    >>> reference_explained(torch.tensor([[0.0], [2.0], [6.0], [8.0]]), [0, 0, 1, 1])
    0.9
    """
    points = points.double()
    points = points - points.mean(0)
    between = 0.0
    for name in set(names):
        members = points[[one == name for one in names]]
        between += len(members) * members.mean(0).square().sum().item()
    return between / points.square().sum().item()


def reference_margins(
    enc_logits: Tensor,
    dec_logits: Tensor,
    features: Tensor,
    *,
    merge_threshold: float | None,
    valid: Tensor | None = None,
    slot_mask: Tensor | None = None,
) -> list[tuple[float, float]]:
    """Return both margins of every clip with features that vary over its valid patches.

    Shape: enc_logits, dec_logits: (B, T, S, H, W). features: (B, T, D, H, W). valid: (B, T) or (B, T, H, W). slot_mask:
        (B, S).

    >>> features = torch.tensor([0.0, 0.0, 4.0, 4.0]).view(1, 1, 1, 1, 4)
    >>> enc = torch.tensor([[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0]]).view(1, 1, 2, 1, 4)
    >>> reference_margins(enc, torch.zeros_like(enc), features, merge_threshold=None)
    [(1.0, 1.0)]
    """
    masks: dict[str, Any] = {"valid": valid, "slot_mask": slot_mask}
    enc, dec = (reference_hard_labels(one, **masks) for one in (enc_logits, dec_logits))
    merging = reference_pseudo_labels(enc_logits, dec_logits, merge_threshold=merge_threshold, **masks)
    margins = []
    for b in range(len(enc)):
        counts = torch.ones_like(enc[b], dtype=torch.bool)
        if valid is not None:
            counts &= valid[b] if valid.ndim == 4 else valid[b, :, None, None]
        if slot_mask is not None:
            counts &= slot_mask[b].any()
        points = features[b].movedim(1, -1)[counts]
        if len(points) == 0 or bool((points == points[0]).all()):
            continue
        of_enc, of_dec = enc[b][counts].tolist(), dec[b][counts].tolist()
        merged = [int(merging.representative[b, name]) for name in of_enc]
        decoder = reference_explained(points, of_dec)
        margins.append((reference_explained(points, of_enc) - decoder, reference_explained(points, merged) - decoder))
    return margins


def reference_adaptive_step(
    state: ReferenceAdaptiveState,
    enc_logits: Tensor,
    dec_logits: Tensor,
    features: Tensor,
    *,
    merge_threshold: float | None = 0.6,
    boundary_weight: float = 1.0,
    interior_weight: float = 1.0,
    momentum: float = 0.98,
    warmup: int = 50,
    dead_zone: float = 0.0,
    valid: Tensor | None = None,
    slot_mask: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, ReferenceAdaptiveState, str]:
    """Ask one question and take one step: return the loss, the new state, and the name of the level.

    Args: as :class:`ssync_loss.AdaptiveSSyncLoss` and :func:`ssync_loss.testing.reference_ssync`.

    >>> features = torch.tensor([0.0, 0.0, 4.0, 4.0]).view(1, 1, 1, 1, 4)
    >>> enc = torch.tensor([[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0]]).view(1, 1, 2, 1, 4)
    >>> state, dec = ReferenceAdaptiveState(), torch.zeros_like(enc)
    >>> loss, state, level = reference_adaptive_step(state, enc, dec, features, momentum=0.5, warmup=1)
    >>> loss.item() > 0, state, level
    (True, ReferenceAdaptiveState(margin=0.5, merged_margin=0.5, questions=1), 'full')
    """
    masks: dict[str, Any] = {"valid": valid, "slot_mask": slot_mask}
    clips = reference_margins(enc_logits, dec_logits, features, merge_threshold=merge_threshold, **masks)
    plain = reference_ssync(enc_logits, dec_logits, merge_threshold=None, **masks, **settings)
    merged = reference_ssync(enc_logits, dec_logits, merge_threshold=merge_threshold, **masks, **settings)
    means = [sum(margins) / len(clips) for margins in zip(*clips, strict=True)]
    # maps with NaN or +inf make the loss NaN; they have no meaningful margins
    if clips and all(map(isfinite, means)) and bool((plain.boundary + plain.interior).isfinite()):
        margin, merged_margin = (
            momentum * one + (1 - momentum) * mean for one, mean in zip(state[:2], means, strict=True)
        )
        state = ReferenceAdaptiveState(margin, merged_margin, state.questions + 1)
    debias = 1 - momentum**state.questions if state.questions else 1.0
    if state.questions < warmup:
        return 0.0 * (plain.boundary + plain.interior), state, "listening"
    if state.merged_margin / debias > dead_zone:
        return boundary_weight * merged.boundary + interior_weight * merged.interior, state, "full"
    if state.margin / debias > dead_zone:
        return boundary_weight * plain.boundary + interior_weight * plain.interior, state, "unmerged"
    return 0.0 * plain.boundary + interior_weight * plain.interior, state, "interior"
