"""A rule for the merge threshold. In the study it did not beat a fixed threshold, so the library does not have it."""

from bisect import bisect_left
from itertools import pairwise

import torch
from torch import Tensor

from ssync_loss.diagnostics import explained_variance
from ssync_loss.functional import pseudo_labels, slot_overlap


@torch.no_grad()
def suggest_merge_threshold(enc_logits: Tensor, features: Tensor, *, keep: float = 0.95) -> float:
    """Suggest the lowest threshold at which merging loses little of the explained variance of the features.

    At this threshold, the encoder's merged labels explain at least ``keep`` times the variance that its unmerged labels
    explain. Both are means over clips. All thresholds between two neighboring overlaps merge the same slots, so the
    suggestion is their midpoint. If the labels explain nothing, it is 1, which merges nothing.

    Shape:
        enc_logits: (B, T, S, H, W). features: (B, T, D, H, W).

    >>> features = torch.tensor([0.0, 1.0, 5.0, 6.0]).view(1, 1, 1, 1, 4)
    >>> enc = torch.tensor([[9.0, 0.0, 0.0, 0.0], [8.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0]]).view(1, 1, 3, 1, 4)
    >>> suggest_merge_threshold(enc, features)  # overlaps 0 and 0.5; merged labels explain 25/26, unmerged 25.5/26
    0.25
    """
    overlap = slot_overlap(enc_logits)
    num_slots = overlap.shape[1]
    pairs = torch.ones(num_slots, num_slots, dtype=torch.bool).triu(1)
    levels = {0.0, 1.0, *overlap[:, pairs].flatten().tolist()}
    thresholds = [*((low + high) / 2 for low, high in pairwise(sorted(levels))), 1.0]

    def explained(threshold: float | None) -> float:
        labels = pseudo_labels(enc_logits, enc_logits, merge_threshold=threshold).enc_labels
        return explained_variance(features, labels, num_slots=num_slots).mean().item()

    wanted = keep * (whole := explained(None))
    # a lower threshold merges more slots and never explains more variance
    return thresholds[bisect_left(thresholds, True, key=lambda one: explained(one) >= wanted)] if whole > 0 else 1.0
