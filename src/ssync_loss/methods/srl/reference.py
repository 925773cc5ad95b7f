"""The contrastive neighbors of SSync written out slowly: one window, one patch, one pair, one slot at a time.

This module says what dense alignment, slot redundancy and temporal contrast compute; the losses say it fast.
Nothing is shared with them, and arguments are taken to be right. All functions are differentiable by autograd
and computed in float64 whatever comes in, so that they can referee faster forms; the result is float32 or wider.
Meant for tests and for reading, not for training.

Sources: Seong, Moon & Heo, From Vicious to Virtuous Cycles: Synergistic Representation Learning for Unsupervised
Video Object-Centric Learning, ICLR 2026 (arXiv:2602.03390); Manasyan et al., Temporally Consistent Object-Centric
Learning by Contrasting Slots, CVPR 2025 (arXiv:2412.14295; adjacent contrast).
"""

import math
from itertools import combinations

import torch
from torch import Tensor


def reference_dense_decoder_alignment_loss(
    features: Tensor,
    anchors: Tensor,
    enc_labels: Tensor,
    *,
    group_frames: int | None = 2,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
) -> Tensor:
    """Compare every reconstructed feature with all anchors of its window.

    A patch is worth ``-(mean over its label of log P + log P of itself) / 2``, its label counting itself.

    Shape:
        features, anchors: (B, T, D, H, W), enc_labels: (B, T, H, W). Returns a scalar.

    >>> features, labels = torch.eye(2).view(1, 1, 2, 1, 2), torch.zeros(1, 1, 1, 2, dtype=torch.int64)
    >>> loss = reference_dense_decoder_alignment_loss(
    ...     features, features, labels, group_frames=1, temperature=1.0, base_temperature=1.0
    ... )
    >>> round(loss.item(), 4)
    0.5633
    """
    values = []
    for patches, targets, labels in _windows(features, anchors.detach(), enc_labels, group_frames):
        for i, patch in enumerate(patches):
            log_probs = torch.stack([patch @ target / temperature for target in targets]).log_softmax(0)
            alike = [log_probs[j] for j in range(len(labels)) if labels[j] == labels[i]]
            values.append(-(_mean(alike, patch) + log_probs[i]) / 2)
    return _result(_mean(values, features) * (temperature / base_temperature), features, anchors)


def reference_dense_encoder_alignment_loss(
    features: Tensor,
    anchors: Tensor,
    dec_labels: Tensor,
    *,
    group_frames: int | None = 2,
    top_k: int = 8,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
) -> Tensor:
    """Compare every feature with all others of its window.

    A patch is worth ``-(mean over its neighbors of log P + mean over the others of its label of log P) / 2``. A
    neighbor is another patch whose anchor is no farther than the ``top_k * group_frames``-th nearest, the patch's
    own being counted.

    Shape:
        features: (B, T, D, H, W), anchors: (B, T, C, H, W), dec_labels: (B, T, H, W). Returns a scalar.

    >>> features = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).view(1, 1, 2, 1, 3)
    >>> loss = reference_dense_encoder_alignment_loss(
    ...     features,
    ...     features,
    ...     torch.arange(3).view(1, 1, 1, 3),
    ...     group_frames=1,
    ...     top_k=2,
    ...     temperature=1.0,
    ...     base_temperature=1.0,
    ... )
    >>> round(loss.item(), 4)
    0.2199
    """
    num_neighbors = top_k * (features.shape[1] if group_frames is None else group_frames)
    values = []
    for patches, targets, labels in _windows(features, anchors.detach(), dec_labels, group_frames):
        for i, patch in enumerate(patches):
            cosines = [float(targets[i] @ target) for target in targets]
            farthest = sorted(cosines, reverse=True)[num_neighbors - 1]
            others = [j for j in range(len(labels)) if j != i]
            if not others:
                values.append(0.0 * patch.sum())
                continue
            scores = torch.stack([patch @ patches[j] / temperature for j in others]).log_softmax(0)
            log_probs = dict(zip(others, scores, strict=True))
            near = [log_probs[j] for j in others if cosines[j] >= farthest]
            alike = [log_probs[j] for j in others if labels[j] == labels[i]]
            values.append(-(_mean(near, patch) + _mean(alike, patch)) / 2)
    return _result(_mean(values, features) * (temperature / base_temperature), features, anchors)


def reference_slot_redundancy_loss(attention: Tensor, slots: Tensor, *, num_picked: int = 5) -> Tensor:
    """Pick one of the two most similar slots, again and again, and ask the picked ones to attend uniformly.

    Shape:
        attention: (B, T, S, N), slots: (B, T, S, D). Returns a scalar.

    >>> attention = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.75, 0.25]]).view(1, 1, 3, 2)
    >>> slots = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]).view(1, 1, 3, 2)
    >>> round(reference_slot_redundancy_loss(attention, slots, num_picked=2).item(), 4)
    0.0654
    """
    num_slots = attention.shape[2]
    picked = []
    for clip, clip_slots in zip(attention.double(), slots.detach().double(), strict=True):
        last = [_unit(slot) for slot in clip_slots[-1]]
        divergence = [_mean([_from_uniform(frame[s]) for frame in clip], clip) for s in range(num_slots)]
        left = set(range(num_slots))
        for _ in range(num_picked):
            pairs = list(combinations(sorted(left), 2))
            if pairs:
                # max and min return the first of equals
                first, second = max(pairs, key=lambda pair: float(last[pair[0]] @ last[pair[1]]))
                pick = min((first, second), key=lambda s: float(divergence[s].detach()))
                picked.append(divergence[pick])
                left.remove(pick)
    return _result(_mean(picked, attention), attention)


def reference_temporal_slot_contrast_loss(
    slots: Tensor, *, temperature: float = 0.1, kind: str = "adjacent", negatives: str = "batch"
) -> Tensor:
    """Compare every slot with those it should be told apart from.

    "adjacent": a slot of frame t + 1 with all slots of frame t. "supervised": a slot with itself one frame before
    and after (the positives) and with all other slots of all frames, ``temperature / 0.07`` times.

    Shape:
        slots: (B, T, S, D). Returns a scalar.

    >>> slots = torch.eye(2).repeat(2, 1).view(1, 2, 2, 2)
    >>> round(reference_temporal_slot_contrast_loss(slots, temperature=1.0).item(), 4)
    0.3133
    """
    num_clips, num_frames, num_slots, _ = slots.shape
    # the name of a token says who it is and when
    tokens = {
        (b, s, t): _unit(slots[b, t, s].double())
        for b in range(num_clips)
        for t in range(num_frames)
        for s in range(num_slots)
    }
    values = []
    for (b, s, t), token in tokens.items():
        scores: list[Tensor] = []
        positives: list[int] = []
        for (other_b, other_s, other_t), other in tokens.items():
            if negatives == "video" and other_b != b:
                continue
            same = (other_b, other_s) == (b, s)
            if kind == "adjacent" and other_t == t - 1:
                positives += [len(scores)] * same
                scores.append(token @ other / temperature)
            if kind == "supervised" and (not same or abs(other_t - t) == 1):
                positives += [len(scores)] * same
                scores.append(token @ other / temperature)
        if positives:
            log_probs = torch.stack(scores).log_softmax(0)
            values.append(-_mean([log_probs[p] for p in positives], token))
        elif kind == "supervised":
            values.append(0.0 * token.sum())
    scale = temperature / 0.07 if kind == "supervised" else 1.0
    return _result(_mean(values, slots) * scale, slots)


def _windows(
    features: Tensor, anchors: Tensor, labels: Tensor, group_frames: int | None
) -> list[tuple[list[Tensor], list[Tensor], list[int]]]:
    """Return the unit vectors of features and anchors and the labels, window by window, patch by patch."""
    num_clips, num_frames, _, height, width = features.shape
    step = num_frames if group_frames is None else group_frames
    windows = []
    for b in range(num_clips):
        for first in range(0, num_frames, step):
            places = [(t, h, w) for t in range(first, first + step) for h in range(height) for w in range(width)]
            windows.append(
                (
                    [_unit(features[b, t, :, h, w].double()) for t, h, w in places],
                    [_unit(anchors[b, t, :, h, w].double()) for t, h, w in places],
                    [int(labels[b, t, h, w]) for t, h, w in places],
                )
            )
    return windows


def _unit(vector: Tensor) -> Tensor:
    """Scale a vector to length 1; one without a length stays zero, without gradient."""
    length = vector.square().sum().sqrt()
    return vector * 0 if length <= 1e-12 else vector / length


def _from_uniform(distribution: Tensor) -> Tensor:
    """Return the divergence of probabilities (N,) from 1/N."""
    return (distribution * ((distribution + 1e-8).log() + math.log(len(distribution)))).sum()


def _mean(values: list[Tensor], like: Tensor) -> Tensor:
    """Return the mean, and an attached 0 of nothing."""
    return torch.stack(values).mean() if values else like.flatten()[:0].sum().double()


def _result(value: Tensor, *given: Tensor) -> Tensor:
    dtype = torch.float32
    for one in given:
        dtype = torch.promote_types(dtype, one.dtype)
    return value.to(dtype)
