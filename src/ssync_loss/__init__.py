"""Losses for video object-centric learning: SSync as one line.

>>> from ssync_loss import SSyncLoss
>>> criterion = SSyncLoss(merge_threshold=0.6)  # loss = loss + criterion(enc_logits, dec_logits)
"""

from ssync_loss import _moved
from ssync_loss.losses import (
    AdaptiveSSyncLoss,
    AffinityConsistencyLoss,
    BoundaryRefinementLoss,
    CenteredCrossEntropy,
    DenseDecoderAlignmentLoss,
    DenseEncoderAlignmentLoss,
    InstanceConsistencyLoss,
    InteriorDenoisingLoss,
    MaskDiversityLoss,
    MaskedTokenLoss,
    OutGenerativeLoss,
    PrototypeHead,
    SemanticConsistencyLoss,
    SlotRedundancyLoss,
    SSyncLoss,
    SSyncTerms,
    StructureAwareLoss,
    TemporalSlotContrastLoss,
)
from ssync_loss.ssync.types import PseudoLabels

__version__ = "0.1.0"

_moved.install()

__all__ = [
    "AdaptiveSSyncLoss",
    "AffinityConsistencyLoss",
    "BoundaryRefinementLoss",
    "CenteredCrossEntropy",
    "DenseDecoderAlignmentLoss",
    "DenseEncoderAlignmentLoss",
    "InstanceConsistencyLoss",
    "InteriorDenoisingLoss",
    "MaskDiversityLoss",
    "MaskedTokenLoss",
    "OutGenerativeLoss",
    "PrototypeHead",
    "PseudoLabels",
    "SSyncLoss",
    "SSyncTerms",
    "SemanticConsistencyLoss",
    "SlotRedundancyLoss",
    "StructureAwareLoss",
    "TemporalSlotContrastLoss",
    "__version__",
]
