"""Engine ``"triton"``: SSync as CUDA kernels, 7 launches from two maps to both gradients.

The README next to this file explains the kernels. The first launch imports ``triton``.
"""

from typing import Any

from torch import Tensor

from ssync_loss.ssync.engines.contract import Engine, in_bytes, weigh
from ssync_loss.ssync.engines.triton._distill import differentiable_distill
from ssync_loss.ssync.engines.triton._labels import find, label
from ssync_loss.ssync.engines.triton._limits import MAX_SLOTS, missing
from ssync_loss.ssync.engines.triton._loss import differentiable_loss
from ssync_loss.ssync.maps import Maps
from ssync_loss.ssync.settings import Reduction, Settings
from ssync_loss.ssync.types import PseudoLabels, SlotLabels, SSyncTerms

__all__ = ["MAX_SLOTS", "TritonEngine", "missing"]


class TritonEngine(Engine):
    """The kernels. NaN or +inf in a valid patch of a present slot makes the loss and its whole gradient NaN."""

    missing = staticmethod(missing)

    def pseudo_labels(self, maps: Maps, settings: Settings) -> PseudoLabels:
        """Compute labels, regions and representatives: 4 launches, 2 without merging."""
        _, *labels = _label(maps, settings, None, with_targets=False, with_labels=True)
        return PseudoLabels._make(labels)

    def distill(
        self,
        logits: Tensor,
        target: Tensor,
        region: Tensor,
        slot_mask: Tensor | None,
        settings: Settings,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Compare one map with labels on a region: 2 launches, 1 with ``reduction="none"``, and 1 for the backward.

        If a selected label names no slot, the value is NaN. Raising an error would have to wait for the device.
        """
        value: Tensor
        value, *_ = differentiable_distill(logits, target, region, slot_mask, *_criterion(settings), reduction)
        return value

    def slot_labels(self, maps: Maps, settings: Settings) -> SlotLabels:
        """Compute labels before merging, and representatives: 3 launches, 1 without merging."""
        found: tuple[Tensor, Tensor] = find(*_inputs(maps, settings))
        return SlotLabels(*found, maps.is_clean())

    def loss(self, maps: Maps, settings: Settings, found: SlotLabels | None = None) -> Tensor:
        """Compute the weighted sum of both terms: 6 launches, 4 without merging, and 1 for the backward."""
        return _step(maps, settings, found, with_labels=False).total

    def terms(self, maps: Maps, settings: Settings) -> SSyncTerms:
        """Compute the sum, both terms and the labels, with the same number of launches."""
        return _step(maps, settings, None, with_labels=True)


def _step(maps: Maps, settings: Settings, found: SlotLabels | None, *, with_labels: bool) -> SSyncTerms:
    targets, *labels = _label(maps, settings, found, with_targets=True, with_labels=with_labels)
    weights = settings.boundary_weight, settings.interior_weight
    # a kernel takes only numbers; weights that are tensors are applied afterwards
    numbers = [1.0 if isinstance(weight, Tensor) else weight for weight in weights]
    total, boundary, interior, num_boundary, num_interior, _ = differentiable_loss(
        maps.enc, maps.dec, targets, maps.slot_mask, maps.clean, *_criterion(settings), *numbers
    )
    if any(isinstance(weight, Tensor) for weight in weights):
        total = weigh(boundary, interior, settings)
    return SSyncTerms(total, boundary, interior, num_boundary, num_interior, PseudoLabels._make(labels))


def _label(
    maps: Maps, settings: Settings, found: SlotLabels | None, *, with_targets: bool, with_labels: bool
) -> tuple[Tensor, ...]:
    regions = settings.min_different, settings.min_same, settings.max_different
    outputs: tuple[Tensor, ...] = label(*_inputs(maps, settings), *in_bytes(found), *regions, with_targets, with_labels)
    return outputs


def _inputs(maps: Maps, settings: Settings) -> tuple[Any, ...]:
    threshold = settings.merge_threshold
    # the operator has one argument for a number, and one for a tensor
    thresholds = (None, threshold.detach()) if isinstance(threshold, Tensor) else (threshold, None)
    return maps.enc.detach(), maps.dec.detach(), maps.valid, maps.slot_mask, *thresholds


def _criterion(settings: Settings) -> tuple[str, float, float]:
    return settings.criterion, settings.label_smoothing, settings.temperature
