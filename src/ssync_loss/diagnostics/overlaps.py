"""A histogram of the overlaps of slots, for choosing a merge threshold."""

import torch.nn.functional as F
from torch import Tensor

from ssync_loss._checks import check_floating, check_int, check_nonnegative, check_not_empty, check_shape
from ssync_loss.ssync.maps import check_slot_mask


def overlap_histogram(overlap: Tensor, *, slot_mask: Tensor | None = None, num_bins: int = 20) -> Tensor:
    """Count the pairs of slots by their overlap, in equal bins from 0 to 1.

    Slots are merged if their overlap exceeds the merge threshold. Add the counts of many batches, and draw them with
    ``visualize.histogram``: a threshold in a gap merges the pairs above the gap and no others.

    Shape: overlap: (B, S, S) within [0, 1], from ``functional.slot_overlap``. slot_mask: (B, S) bool; pairs with an
        absent slot or an overlap of NaN do not count. Returns (num_bins,) int64. The last bin includes 1.

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), spatio-temporal activation consistency.
    Raises: TypeError, ValueError if a dtype, shape or number does not fit.

    >>> import torch
    >>> overlap = torch.tensor([[1.0, 0.6, 0.0], [0.6, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> overlap_histogram(overlap[None], num_bins=5).tolist()  # one pair of 0.6, two of 0
    [2, 0, 0, 1, 0]
    """
    size = check_shape("overlap", overlap, "B S S")
    check_not_empty("overlap", size, "S")
    check_floating("overlap", overlap)
    check_nonnegative("overlap", overlap)
    check_int("num_bins", num_bins, 1)
    pairs = (~overlap.isnan()).triu(1)
    if slot_mask is not None:
        check_slot_mask(slot_mask, size, overlap=overlap)
        pairs = pairs & slot_mask.unsqueeze(1) & slot_mask.unsqueeze(2)
    bins = (overlap.detach().double() * num_bins).long().clamp(0, num_bins - 1)
    return (F.one_hot(bins, num_bins) * pairs.unsqueeze(3)).sum((0, 1, 2))
