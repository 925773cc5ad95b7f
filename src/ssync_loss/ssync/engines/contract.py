"""What an engine computes, and how a step is put together from its parts."""

from typing import Protocol

from torch import Tensor

from ssync_loss.ssync.maps import Maps
from ssync_loss.ssync.settings import Reduction, Settings
from ssync_loss.ssync.types import PseudoLabels, SlotLabels, SSyncTerms


class Engine(Protocol):
    """Computes SSync on maps that are checked, on one grid, and outside autocast. Values do not depend on it.

    A new engine is a class with these members, in a module beside this one, and an entry in ``ENGINES``.
    """

    def missing(self, *maps: Tensor) -> str | None:
        """Say what keeps the engine from taking maps (B, T, S, H, W), without a look at data; None: nothing does."""

    def pseudo_labels(self, maps: Maps, settings: Settings) -> PseudoLabels:
        """Compute labels, regions and representatives."""

    def distill(
        self,
        logits: Tensor,
        target: Tensor,
        region: Tensor,
        slot_mask: Tensor | None,
        settings: Settings,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Compare one map with labels on a region."""

    def slot_labels(self, maps: Maps, settings: Settings) -> SlotLabels:
        """Compute the labels before merging, and what is to be merged."""

    def loss(self, maps: Maps, settings: Settings, found: SlotLabels | None = None) -> Tensor:
        """Compute the weighted sum of both terms. What was ``found`` is not computed again."""

    def terms(self, maps: Maps, settings: Settings) -> SSyncTerms:
        """Compute that sum with its parts and labels; parts can be differentiated, and may share one graph."""


def compose(engine: Engine, maps: Maps, settings: Settings, labels: PseudoLabels) -> SSyncTerms:
    """Compute both terms from labels by two distillations."""
    boundary = one_term(engine, maps.dec, labels.enc_labels, labels.boundary, maps, settings)
    interior = one_term(engine, maps.enc, labels.dec_labels, labels.interior, maps, settings)
    total = weigh(boundary, interior, settings)
    return SSyncTerms(total, boundary, interior, labels.boundary.sum(), labels.interior.sum(), labels)


def one_term(engine: Engine, student: Tensor, target: Tensor, region: Tensor, maps: Maps, settings: Settings) -> Tensor:
    """Teach one of the maps; the loss and all of its gradient are NaN where a map holds NaN or +inf."""
    spoil = maps.spoil()
    return engine.distill(student.to(maps.dtype) * spoil, target, region, maps.slot_mask, settings) * spoil


def weigh(boundary: Tensor, interior: Tensor, settings: Settings) -> Tensor:
    """Add both terms with their weights; a weight of 1 costs nothing."""
    weights = settings.boundary_weight, settings.interior_weight
    parts = [
        part if not isinstance(weight, Tensor) and weight == 1 else weight * part
        for part, weight in zip((boundary, interior), weights, strict=True)
    ]
    return parts[0] + parts[1]
