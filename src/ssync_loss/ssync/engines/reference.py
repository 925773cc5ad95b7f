"""Engine ``"reference"``: loops over clips, frames, slots and neighbors, for checking."""

import torch
from torch import Tensor

from ssync_loss.ssync.engines.contract import compose
from ssync_loss.ssync.maps import Maps
from ssync_loss.ssync.reference import (
    reference_hard_labels,
    reference_merged_labels,
    reference_pseudo_labels,
    reference_selective_distillation_loss,
)
from ssync_loss.ssync.settings import Reduction, Settings
from ssync_loss.ssync.types import PseudoLabels, SlotLabels, SSyncTerms


class ReferenceEngine:
    """The slow definitions."""

    def missing(self, *maps: Tensor) -> str | None:  # noqa: ARG002 (it takes all maps)
        """Say that nothing is missing."""
        return None

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
        """Compute the labels before merging, and what is to be merged."""
        masks = {"valid": maps.counted, "slot_mask": maps.slot_mask}
        hard = torch.stack([reference_hard_labels(one, **masks) for one in (maps.enc, maps.dec)])
        return SlotLabels(hard, self.pseudo_labels(maps, settings).representative, maps.is_clean())

    def loss(self, maps: Maps, settings: Settings, found: SlotLabels | None = None) -> Tensor:
        """Compute the weighted sum of both terms."""
        if found is None:
            return self.terms(maps, settings).total
        cells = torch.ones_like(found.hard[0], dtype=torch.bool) if maps.counted is None else maps.counted
        enc_labels, dec_labels = found.hard.clone()
        regions = {name: getattr(settings, name) for name in ("min_different", "min_same", "max_different")}
        labels = reference_merged_labels(enc_labels, dec_labels, found.representative, cells, **regions)
        return compose(self, maps, settings, labels).total

    def terms(self, maps: Maps, settings: Settings) -> SSyncTerms:
        """Compute that sum with its parts and labels."""
        return compose(self, maps, settings, self.pseudo_labels(maps, settings))
