"""Losses as modules: a module remembers settings, a function computes."""

from ssync_loss.losses.boundary import BoundaryRefinementLoss
from ssync_loss.losses.dense import DenseDecoderAlignmentLoss, DenseEncoderAlignmentLoss
from ssync_loss.losses.interior import InteriorDenoisingLoss
from ssync_loss.losses.redundancy import SlotRedundancyLoss
from ssync_loss.losses.ssync import SSyncLoss, SSyncTerms
from ssync_loss.losses.temporal import TemporalSlotContrastLoss

__all__ = [
    "BoundaryRefinementLoss",
    "DenseDecoderAlignmentLoss",
    "DenseEncoderAlignmentLoss",
    "InteriorDenoisingLoss",
    "SSyncLoss",
    "SSyncTerms",
    "SlotRedundancyLoss",
    "TemporalSlotContrastLoss",
]
