"""Engine ``"torch"``: the files of :mod:`ssync_loss.ssync`, on any device and under any compiler."""

from torch import Tensor

from ssync_loss.ssync import distillation
from ssync_loss.ssync.engines.contract import Engine
from ssync_loss.ssync.labels import find_labels, find_slots
from ssync_loss.ssync.maps import Maps
from ssync_loss.ssync.settings import Reduction, Settings
from ssync_loss.ssync.types import PseudoLabels, SlotLabels


class TorchEngine(Engine):
    """Plain torch."""

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
