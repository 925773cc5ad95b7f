"""Engine ``"reference"``: loops over clips, frames, slots and neighbors, for tests."""

import torch
from torch import Tensor

from ssync_loss.ssync.engines.contract import Engine
from ssync_loss.ssync.maps import Maps
from ssync_loss.ssync.reference import (
    reference_hard_labels,
    reference_pseudo_labels,
    reference_selective_distillation_loss,
)
from ssync_loss.ssync.settings import Reduction, Settings
from ssync_loss.ssync.types import PseudoLabels, SlotLabels


class ReferenceEngine(Engine):
    """The slow definitions of :mod:`ssync_loss.ssync.reference`."""

    def pseudo_labels(self, maps: Maps, settings: Settings) -> PseudoLabels:
        """Compute labels, regions and representatives."""
        threshold = settings.merge_threshold
        if isinstance(threshold, Tensor):
            threshold = float(threshold) if threshold < float("inf") else None
        return reference_pseudo_labels(
            maps.enc,
            maps.dec,
            merge_threshold=threshold,
            min_different=settings.min_different,
            min_same=settings.min_same,
            max_different=settings.max_different,
            valid=maps.counted,
            slot_mask=maps.slot_mask,
        )

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
        return reference_selective_distillation_loss(
            logits,
            target,
            region,
            criterion=settings.criterion,
            label_smoothing=settings.label_smoothing,
            temperature=settings.temperature,
            slot_mask=slot_mask,
            reduction=reduction,
        )

    def slot_labels(self, maps: Maps, settings: Settings) -> SlotLabels:
        """Compute labels before merging, and representatives."""
        masks = {"valid": maps.counted, "slot_mask": maps.slot_mask}
        hard = torch.stack([reference_hard_labels(one, **masks) for one in (maps.enc, maps.dec)])
        return SlotLabels(hard, self.pseudo_labels(maps, settings).representative, maps.is_clean())
