"""Losses as modules: a module remembers settings, a function computes."""

from ssync_loss.losses.ssync import (
    BoundaryRefinementLoss,
    InteriorDenoisingLoss,
    SSyncLoss,
    SSyncTerms,
)

__all__ = ["BoundaryRefinementLoss", "InteriorDenoisingLoss", "SSyncLoss", "SSyncTerms"]
