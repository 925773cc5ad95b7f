"""Engine ``"torch"``: the method as it is written in :mod:`ssync_loss.ssync`, on any device, under any compiler."""

from torch import Tensor

from ssync_loss.ssync import distillation
from ssync_loss.ssync.engines.contract import compose
from ssync_loss.ssync.labels import find_labels, find_slots, merge_labels
from ssync_loss.ssync.maps import Maps
from ssync_loss.ssync.settings import Reduction, Settings
from ssync_loss.ssync.types import PseudoLabels, SlotLabels, SSyncTerms


class TorchEngine:
    """Plain torch."""

    def missing(self, *maps: Tensor) -> str | None:  # noqa: ARG002 (it takes all maps)
        """Say that nothing is missing."""
        return None

    def pseudo_labels(self, maps: Maps, settings: Settings) -> PseudoLabels:
        """Compute labels, regions and representatives."""
        return find_labels(maps, settings)

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
        return distillation.distill(logits, target, region, slot_mask, settings, reduction)

    def slot_labels(self, maps: Maps, settings: Settings) -> SlotLabels:
        """Compute the labels before merging, and what is to be merged."""
        return find_slots(maps, settings)

    def loss(self, maps: Maps, settings: Settings, found: SlotLabels | None = None) -> Tensor:
        """Compute the weighted sum of both terms."""
        if found is None:
            return self.terms(maps, settings).total
        labels = merge_labels(found.hard, found.representative, maps, settings)
        return compose(self, maps, settings, labels).total

    def terms(self, maps: Maps, settings: Settings) -> SSyncTerms:
        """Compute that sum with its parts and labels."""
        return compose(self, maps, settings, self.pseudo_labels(maps, settings))
