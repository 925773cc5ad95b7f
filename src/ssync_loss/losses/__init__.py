"""Losses as modules: a module keeps settings and calls a function."""

from ssync_loss.methods.ino.affinity import AffinityConsistencyLoss
from ssync_loss.methods.ino.centered import CenteredCrossEntropy
from ssync_loss.methods.ino.masked_tokens import MaskedTokenLoss
from ssync_loss.methods.ino.out_generative import OutGenerativeLoss
from ssync_loss.methods.ino.prototypes import PrototypeHead
from ssync_loss.methods.slotcurri.structure import StructureAwareLoss
from ssync_loss.methods.smtc.diversity import MaskDiversityLoss
from ssync_loss.methods.smtc.instance import InstanceConsistencyLoss
from ssync_loss.methods.smtc.semantic import SemanticConsistencyLoss
from ssync_loss.methods.srl.dense import DenseDecoderAlignmentLoss, DenseEncoderAlignmentLoss
from ssync_loss.methods.srl.redundancy import SlotRedundancyLoss
from ssync_loss.methods.srl.temporal import TemporalSlotContrastLoss
from ssync_loss.ssync.adaptive import AdaptiveSSyncLoss
from ssync_loss.ssync.modules import BoundaryRefinementLoss, InteriorDenoisingLoss, SSyncLoss
from ssync_loss.ssync.types import SSyncTerms

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
    "SSyncLoss",
    "SSyncTerms",
    "SemanticConsistencyLoss",
    "SlotRedundancyLoss",
    "StructureAwareLoss",
    "TemporalSlotContrastLoss",
]
