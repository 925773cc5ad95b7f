"""What the label stage hands to the losses."""

from typing import NamedTuple

from torch import Tensor


class PseudoLabels(NamedTuple):
    """Hard labels of both maps after merging, and the patches on which each teaches.

    Attributes:
        enc_labels: (B, T, H, W) int64, slot index of every patch in the encoder's map, merged. 0 where invalid.
        dec_labels: the same of the decoder's map, merged with the same representatives.
        boundary: (B, T, H, W) bool, where ``enc_labels`` teach the decoder.
        interior: (B, T, H, W) bool, where ``dec_labels`` teach the encoder. May overlap with ``boundary``.
        representative: (B, S) int64, the slot each slot was merged into; itself where it was not.
    """

    enc_labels: Tensor
    dec_labels: Tensor
    boundary: Tensor
    interior: Tensor
    representative: Tensor
