"""The results of SSync."""

from typing import NamedTuple

from torch import Tensor


class PseudoLabels(NamedTuple):
    """Hard labels of both maps after merging, and the patches on which each teaches.

    Attributes:
        enc_labels: (B, T, H, W) int64, slot index of every patch in the encoder's map, merged. 0 where invalid.
        dec_labels: the same for the decoder's map, merged with the same representatives.
        boundary: (B, T, H, W) bool, where ``enc_labels`` teach the decoder.
        interior: (B, T, H, W) bool, where ``dec_labels`` teach the encoder. May overlap with ``boundary``.
        representative: (B, S) int64, the slot that each slot was merged into, or itself.

    Raises: nothing; fields are not checked.

    >>> import torch
    >>> from ssync_loss.functional import pseudo_labels
    >>> maps = torch.eye(2).view(1, 1, 2, 1, 2)  # each slot wins a patch
    >>> pseudo_labels(maps, maps).enc_labels.tolist()
    [[[[0, 1]]]]
    """

    enc_labels: Tensor
    dec_labels: Tensor
    boundary: Tensor
    interior: Tensor
    representative: Tensor


class SlotLabels(NamedTuple):
    """Hard labels of both maps before merging, and representatives.

    Attributes:
        hard: (2, B, T, H, W) integer, first the encoder's labels, then the decoder's. Any slot or -1 where invalid.
        representative: (B, S) integer, the slot that each slot is merged into, or itself.
        clean: scalar bool, False if a valid patch of a present slot holds NaN or +inf.
    """

    hard: Tensor
    representative: Tensor
    clean: Tensor


class SSyncTerms(NamedTuple):
    """The result of :meth:`ssync_loss.SSyncLoss.terms`. All are tensors, so that nothing waits for a device.

    Attributes:
        total: scalar, the weighted, ramped sum, which ``forward`` returns.
        boundary: scalar, the unweighted mean of the boundary term, which teaches the decoder.
        interior: scalar, the unweighted mean of the interior term, which teaches the encoder.
        num_boundary: scalar, the number of boundary patches in the batch, int64.
        num_interior: scalar, the number of interior patches in the batch, int64.
        labels: the merged labels and the regions behind them.

    Raises: nothing; fields are not checked.

    >>> import torch
    >>> from ssync_loss import SSyncLoss
    >>> terms = SSyncLoss().eval().terms(2 * torch.eye(2).view(1, 1, 2, 1, 2), torch.zeros(1, 1, 2, 1, 2))
    >>> terms.boundary.item(), terms.num_boundary.item()  # (1/2 - 1)^2 on both patches
    (0.25, 2)
    """

    total: Tensor
    boundary: Tensor
    interior: Tensor
    num_boundary: Tensor
    num_interior: Tensor
    labels: PseudoLabels
