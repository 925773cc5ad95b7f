"""Losses as modules: a module remembers settings, a function computes."""

from ssync_loss.losses.boundary import BoundaryRefinementLoss
from ssync_loss.losses.interior import InteriorDenoisingLoss
from ssync_loss.losses.ssync import SSyncLoss, SSyncTerms

__all__ = ["BoundaryRefinementLoss", "InteriorDenoisingLoss", "SSyncLoss", "SSyncTerms"]
