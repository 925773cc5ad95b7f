"""Losses as modules: a module remembers settings, a function computes."""

from ssync_loss.losses.affinity import AffinityConsistencyLoss
from ssync_loss.losses.boundary import BoundaryRefinementLoss
from ssync_loss.losses.centered import CenteredCrossEntropy
from ssync_loss.losses.dense import DenseDecoderAlignmentLoss, DenseEncoderAlignmentLoss
from ssync_loss.losses.diversity import MaskDiversityLoss
from ssync_loss.losses.instance import InstanceConsistencyLoss
from ssync_loss.losses.interior import InteriorDenoisingLoss
from ssync_loss.losses.masked_tokens import MaskedTokenLoss
from ssync_loss.losses.out_generative import OutGenerativeLoss
from ssync_loss.losses.prototypes import PrototypeHead
from ssync_loss.losses.redundancy import SlotRedundancyLoss
from ssync_loss.losses.semantic import SemanticConsistencyLoss
from ssync_loss.losses.ssync import SSyncLoss, SSyncTerms
from ssync_loss.losses.structure import StructureAwareLoss
from ssync_loss.losses.temporal import TemporalSlotContrastLoss

__all__ = [
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
    "SSyncLoss",
    "SSyncTerms",
    "SemanticConsistencyLoss",
    "SlotRedundancyLoss",
    "StructureAwareLoss",
    "TemporalSlotContrastLoss",
]
