"""How well a partition into slots fits features."""

from collections.abc import Callable

import torch
from torch import Tensor

from ssync_loss._checks import as_index, check_int, check_label_range, check_not_empty
from ssync_loss._inputs import check_floats, check_labels
from ssync_loss.diagnostics.statistics import valid_patches
from ssync_loss.ssync.fit import explained_shares
from ssync_loss.ssync.merging import unmerged

# channels of a block: to save memory, one block at a time becomes float64
_CHANNELS = 64


def explained_variance(features: Tensor, labels: Tensor, *, num_slots: int, valid: Tensor | None = None) -> Tensor:
    """Share of a clip's feature variance that a partition explains: ``1 - SS_within / SS_total``.

    ``SS_total`` sums the squared distances of a clip's patches to their mean. ``SS_within`` sums the squared distances
    of patches to the mean of their slot over the clip.

    Shape: features: (B, T, D, H, W), floating point. labels: (B, T, H, W) integers within [0, num_slots). valid: (B, T)
        or (B, T, H, W) bool. Returns (B,), float64, within [0, 1]; 0 if features are constant or no patch is valid, NaN
        if features of a valid patch are not finite.

    Raises: TypeError, ValueError if a dtype, shape or device does not fit, or labels are seen to be out of range.

    >>> features = torch.tensor([0.0, 2.0, 6.0, 8.0]).view(1, 1, 1, 1, 4)
    >>> explained_variance(features, torch.tensor([[[[0, 0, 1, 1]]]]), num_slots=2).tolist()  # 1 - 4/40
    [0.9]
    """
    labels, patches = _check_labeled_features(features, labels, valid)
    check_int("num_slots", num_slots, 1)
    check_label_range("labels", labels, num_slots)
    counted = None if valid is None else patches
    shares, _ = explained_shares(
        features, labels, labels, num_slots, counted, unmerged(len(labels), num_slots, labels.device)
    )
    return shares[0]


def edge_alignment(features: Tensor, labels: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Measure how well label edges follow feature edges, as an AUC.

    A pair of adjacent patches of a frame (four neighbors) has an edge if its labels differ. The value is the
    probability that the features of a pair with an edge are further apart than those of a pair without,
    ``P(edge > no edge) + P(edge == no edge) / 2``: 1 if all label edges are the strongest feature edges, 0.5 by chance.

    Shape: features: (B, T, D, H, W), floating point. labels: (B, T, H, W) integers. valid: (B, T) or (B, T, H, W) bool;
        a pair counts if both patches are valid. Returns (B,), float64; 0.5 if no pair has an edge or all pairs have
        one, NaN if features of a valid pair are not finite.

    Raises: TypeError, ValueError if a dtype, shape or device does not fit.

    >>> features = torch.tensor([0.0, 1.0, 3.0, 6.0]).view(1, 1, 1, 1, 4)  # steps of 1, 2 and 3
    >>> edge_alignment(features, torch.tensor([[[[0, 0, 1, 1]]]])).tolist()  # 2 > 1, but 2 < 3
    [0.5]
    """
    labels, patches = _check_labeled_features(features, labels, valid)
    with torch.no_grad():
        edge, counted = _pairs(labels, torch.ne), _pairs(patches, torch.logical_and)
        distance = torch.zeros_like(edge, dtype=torch.float64)
        for block in features.split(_CHANNELS, dim=2):
            distance = distance + _pairs(block.double(), lambda one, other: (one - other).square().sum(2))
        return _auc(distance, edge, counted)


def _check_labeled_features(features: Tensor, labels: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    size = check_labels("labels", labels, "B T H W", {})
    index = as_index("labels", labels)
    check_not_empty("labels", size, "T H W")
    check_floats("features", features, "B T D H W", size, filled="D", labels=labels)
    return index, valid_patches(valid, labels)


def _pairs(cells: Tensor, compare: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Compare every cell (B, T, ..., H, W) with its right and its lower neighbor: (B, pairs)."""
    right, below = compare(cells[..., 1:], cells[..., :-1]), compare(cells[..., 1:, :], cells[..., :-1, :])
    return torch.cat([right.flatten(1), below.flatten(1)], dim=1)


def _auc(score: Tensor, positive: Tensor, counted: Tensor) -> Tensor:
    """Return the rank statistic of Mann and Whitney of every row; ties count half."""
    positive, negative = positive & counted, ~positive & counted
    # all other pairs sort behind every score
    ranked = torch.where(negative, score, float("inf")).sort(dim=1).values
    score = score.contiguous()
    # twice the number of won pairs, an exact integer
    won = torch.searchsorted(ranked, score) + torch.searchsorted(ranked, score, right=True)
    won = torch.where(positive, won, 0).sum(1)
    pairs = positive.sum(1) * negative.sum(1)
    auc = torch.where(pairs == 0, 0.5, won.double() / (2 * pairs).clamp_min(1))
    broken = (counted & ~score.isfinite()).any(1)
    return torch.where(broken, torch.nan, auc)
