"""Engine ``"torch"``: the method as it is written in :mod:`ssync_loss.ssync`, on any device, under any compiler."""

from torch import Tensor

from ssync_loss.ssync import distillation
from ssync_loss.ssync.engines.contract import compose
from ssync_loss.ssync.labels import find_labels
from ssync_loss.ssync.maps import Maps
from ssync_loss.ssync.settings import Reduction, Settings
from ssync_loss.ssync.types import PseudoLabels, SSyncTerms


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

    def loss(self, maps: Maps, settings: Settings) -> Tensor:
        """Compute the weighted sum of both terms."""
        return self.terms(maps, settings).total

    def terms(self, maps: Maps, settings: Settings) -> SSyncTerms:
        """Compute that sum with its parts and labels."""
        return compose(self, maps, settings)
