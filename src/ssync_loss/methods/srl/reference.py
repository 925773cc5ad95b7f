"""SRL in loops, see :mod:`ssync_loss.methods._slow`: one window, one patch, one pair, one slot at a time.

Sources: Seong, Moon & Heo, ICLR 2026 (arXiv:2602.03390); Manasyan et al., CVPR 2025 (arXiv:2412.14295; "adjacent").
"""

import math
from itertools import combinations, product

import torch
from torch import Tensor

from ssync_loss.methods._slow import mean, unit, widened


def reference_dense_decoder_alignment_loss(
    features: Tensor,
    anchors: Tensor,
    enc_labels: Tensor,
    *,
    group_frames: int | None = 2,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
) -> Tensor:
    """Compare every reconstructed feature with all anchors of its window."""
    values = []
    for patches, targets, labels in _windows(features, anchors.detach(), enc_labels, group_frames):
        for i, patch in enumerate(patches):
            log_probs = torch.stack([patch @ target / temperature for target in targets]).log_softmax(0)
            alike = [log_probs[j] for j in range(len(labels)) if labels[j] == labels[i]]
            values.append(-(mean(alike, patch) + log_probs[i]) / 2)
    return widened(mean(values, features) * (temperature / base_temperature), features, anchors)


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
    """Compare every feature with all others of its window."""
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
            values.append(-(mean(near, patch) + mean(alike, patch)) / 2)
    return widened(mean(values, features) * (temperature / base_temperature), features, anchors)


def reference_slot_redundancy_loss(attention: Tensor, slots: Tensor, *, num_picked: int = 5) -> Tensor:
    """Pick one of the two most similar slots, repeatedly: attention (B, T, S, N), slots (B, T, S, D)."""
    num_slots = attention.shape[2]
    picked = []
    for clip, clip_slots in zip(attention.double(), slots.detach().double(), strict=True):
        last = [unit(slot) for slot in clip_slots[-1]]
        # divergence of every slot and frame from 1/N
        apart = (clip * ((clip + 1e-8).log() + math.log(clip.shape[2]))).sum(2)
        divergence = [mean(list(apart[:, s]), clip) for s in range(num_slots)]
        left = set(range(num_slots))
        for _ in range(num_picked):
            pairs = list(combinations(sorted(left), 2))
            if pairs:
                # max and min return the first of equals
                first, second = max(pairs, key=lambda pair: float(last[pair[0]] @ last[pair[1]]))
                pick = min((first, second), key=lambda s: float(divergence[s].detach()))
                picked.append(divergence[pick])
                left.remove(pick)
    return widened(mean(picked, attention), attention)


def reference_temporal_slot_contrast_loss(
    slots: Tensor, *, temperature: float = 0.1, kind: str = "adjacent", negatives: str = "batch"
) -> Tensor:
    """Compare every slot with its positives and negatives."""
    num_clips, num_frames, num_slots, _ = slots.shape
    # key: clip, slot, frame
    tokens = {
        (b, s, t): unit(slots[b, t, s]) for b, t, s in product(range(num_clips), range(num_frames), range(num_slots))
    }
    values = []
    for (b, s, t), token in tokens.items():
        scores: list[Tensor] = []
        positives: list[int] = []
        for (other_b, other_s, other_t), other in tokens.items():
            same = (other_b, other_s) == (b, s)
            compared = other_t == t - 1 if kind == "adjacent" else not same or abs(other_t - t) == 1
            if compared and (negatives == "batch" or other_b == b):
                positives += [len(scores)] * same
                scores.append(token @ other / temperature)
        if positives:
            log_probs = torch.stack(scores).log_softmax(0)
            values.append(-mean([log_probs[p] for p in positives], token))
        elif kind == "supervised":
            values.append(0.0 * token.sum())
    scale = temperature / 0.07 if kind == "supervised" else 1.0
    return widened(mean(values, slots) * scale, slots)


def _windows(
    features: Tensor, anchors: Tensor, labels: Tensor, group_frames: int | None
) -> list[tuple[list[Tensor], list[Tensor], list[int]]]:
    """Return the unit vectors of features and anchors and the labels, window by window, patch by patch."""
    num_clips, num_frames, _, height, width = features.shape
    step = num_frames if group_frames is None else group_frames
    windows = []
    for b, first in product(range(num_clips), range(0, num_frames, step)):
        places = list(product(range(first, first + step), range(height), range(width)))
        ours, theirs = ([unit(one[b, t, :, h, w]) for t, h, w in places] for one in (features, anchors))
        windows.append((ours, theirs, [int(labels[b, t, h, w]) for t, h, w in places]))
    return windows
