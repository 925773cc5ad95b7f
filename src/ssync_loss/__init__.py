"""Losses for video object-centric learning: SSync as one line.

>>> from ssync_loss import SSyncLoss
>>> criterion = SSyncLoss(merge_threshold=0.6)  # loss = loss + criterion(enc_logits, dec_logits)
"""

from ssync_loss._types import PseudoLabels
from ssync_loss.losses import (
    BoundaryRefinementLoss,
    DenseDecoderAlignmentLoss,
    DenseEncoderAlignmentLoss,
    InteriorDenoisingLoss,
    SlotRedundancyLoss,
    SSyncLoss,
    SSyncTerms,
    TemporalSlotContrastLoss,
)

__version__ = "0.1.0"

__all__ = [
    "BoundaryRefinementLoss",
    "DenseDecoderAlignmentLoss",
    "DenseEncoderAlignmentLoss",
    "InteriorDenoisingLoss",
    "PseudoLabels",
    "SSyncLoss",
    "SSyncTerms",
    "SlotRedundancyLoss",
    "TemporalSlotContrastLoss",
    "__version__",
]
