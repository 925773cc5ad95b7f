"""Engine ``"triton"``: SSync as CUDA kernels, 7 launches from two maps to both gradients.

How they work is told in the README beside this file. ``triton`` is imported when a kernel is launched first.
"""

from typing import Any, Literal, NamedTuple

from torch import Tensor

from ssync_loss.ssync.engines.contract import weigh
from ssync_loss.ssync.engines.triton import _ops
from ssync_loss.ssync.engines.triton._facts import MAX_SLOTS, missing
from ssync_loss.ssync.maps import Maps
from ssync_loss.ssync.settings import Reduction, Settings
from ssync_loss.ssync.types import PseudoLabels, SSyncTerms

__all__ = ["MAX_SLOTS", "TritonEngine", "distill", "missing", "pseudo_labels", "step"]


class Terms(NamedTuple):
    """As :class:`ssync_loss.SSyncTerms`, with labels only if they were asked for."""

    total: Tensor
    boundary: Tensor
    interior: Tensor
    num_boundary: Tensor
    num_interior: Tensor
    labels: PseudoLabels | None


class TritonEngine:
    """The kernels."""

    def missing(self, *maps: Tensor) -> str | None:
        """Say what keeps the kernels from taking maps."""
        return missing(*maps)

    def pseudo_labels(self, maps: Maps, settings: Settings) -> PseudoLabels:
        """Compute labels, regions and representatives."""
        return pseudo_labels(
            maps.enc, maps.dec, valid=maps.valid, slot_mask=maps.slot_mask, **_label_settings(settings)
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
        how = _criterion_settings(settings)
        return distill(logits, target, region, slot_mask=slot_mask, reduction=reduction, **how)

    def loss(self, maps: Maps, settings: Settings) -> Tensor:
        """Compute the weighted sum of both terms."""
        return self._step(maps, settings, with_labels=False).total

    def terms(self, maps: Maps, settings: Settings) -> SSyncTerms:
        """Compute that sum with its parts and labels."""
        return SSyncTerms._make(self._step(maps, settings, with_labels=True))

    def _step(self, maps: Maps, settings: Settings, *, with_labels: bool) -> Terms:
        weights = settings.boundary_weight, settings.interior_weight
        # a kernel takes numbers
        numbers = [1.0 if isinstance(weight, Tensor) else weight for weight in weights]
        terms = step(
            maps.enc,
            maps.dec,
            valid=maps.valid,
            slot_mask=maps.slot_mask,
            clean=maps.clean,
            boundary_weight=numbers[0],
            interior_weight=numbers[1],
            with_labels=with_labels,
            **_label_settings(settings),
            **_criterion_settings(settings),
        )
        if not any(isinstance(weight, Tensor) for weight in weights):
            return terms
        return terms._replace(total=weigh(terms.boundary, terms.interior, settings))


def _label_settings(settings: Settings) -> dict[str, Any]:
    names = ("merge_threshold", "min_different", "min_same", "max_different")
    return {name: getattr(settings, name) for name in names}


def _criterion_settings(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("criterion", "label_smoothing", "temperature")}


def step(
    enc: Tensor,
    dec: Tensor,
    *,
    valid: Tensor | None,
    slot_mask: Tensor | None,
    clean: Tensor | None,
    merge_threshold: float | Tensor | None,
    min_different: int,
    min_same: int,
    max_different: int,
    criterion: Literal["mse", "cross_entropy"],
    label_smoothing: float,
    temperature: float,
    boundary_weight: float,
    interior_weight: float,
    with_labels: bool,
) -> Terms:
    """Compute both losses of two maps, with their gradients to come: 6 launches, and 1 for the backward.

    ``total = boundary_weight * boundary + interior_weight * interior``. Without merging it is 4 launches. NaN or
    +inf in a valid patch of a present slot makes all three NaN, and the gradients of all selected patches.

    Shape:
        enc, dec: (B, T, S, H, W) with any strides. valid: (B, T, H, W) bool. slot_mask: (B, S) bool.

    Args:
        enc: encoder logits, float16, bfloat16 or float32.
        dec: decoder logits, likewise; not necessarily the same.
        valid: patches that count.
        slot_mask: slots that are present; a clip without one counts nowhere.
        clean: scalar bool, False where NaN or +inf was found already, in cells that were not handed on.
        merge_threshold: the overlap above which slots are merged, a number or a scalar tensor, or None.
        min_different: differing neighbors that make a boundary.
        min_same: agreeing neighbors without which a patch is noise.
        max_different: differing neighbors allowed in an interior.
        criterion: ``"mse"`` or ``"cross_entropy"``.
        label_smoothing: for ``"cross_entropy"`` only.
        temperature: of the softmax.
        boundary_weight: of the boundary term in the total.
        interior_weight: of the interior term in the total.
        with_labels: whether to return ``PseudoLabels``, 18 bytes a patch.
    """
    targets, *labels = _ops.label(
        enc.detach(),
        dec.detach(),
        valid,
        slot_mask,
        *_number_or_tensor(merge_threshold),
        min_different,
        min_same,
        max_different,
        True,
        with_labels,
    )
    total, boundary, interior, num_boundary, num_interior, _ = _ops.differentiable_loss(
        enc,
        dec,
        targets,
        slot_mask,
        clean,
        criterion,
        label_smoothing,
        temperature,
        boundary_weight,
        interior_weight,
    )
    return Terms(
        total, boundary, interior, num_boundary, num_interior, PseudoLabels._make(labels) if with_labels else None
    )


def pseudo_labels(
    enc: Tensor,
    dec: Tensor,
    *,
    valid: Tensor | None,
    slot_mask: Tensor | None,
    merge_threshold: float | Tensor | None,
    min_different: int,
    min_same: int,
    max_different: int,
) -> PseudoLabels:
    """Compute labels, regions and representatives: 4 launches, 2 without merging. Arguments as in :func:`step`."""
    _, *labels = _ops.label(
        enc.detach(),
        dec.detach(),
        valid,
        slot_mask,
        *_number_or_tensor(merge_threshold),
        min_different,
        min_same,
        max_different,
        False,
        True,
    )
    return PseudoLabels._make(labels)


def distill(
    logits: Tensor,
    target: Tensor,
    region: Tensor,
    *,
    criterion: Literal["mse", "cross_entropy"],
    label_smoothing: float,
    temperature: float,
    slot_mask: Tensor | None,
    reduction: Literal["none", "sum", "mean"],
) -> Tensor:
    """Compare one map with labels on a region: 2 launches, 1 with ``reduction="none"``, and 1 for the backward.

    A selected label that is no slot at all makes its patch NaN: it cannot be found in time to complain.

    Shape:
        logits: (B, T, S, H, W) with any strides. target: (B, T, H, W) integers. region: (B, T, H, W) bool.
        slot_mask: (B, S) bool. Returns a scalar, or (B, T, H, W) with ``reduction="none"``, in float32.

    Args:
        logits: the map that is taught.
        target: slot index of every patch.
        region: the patches that count.
        criterion: ``"mse"`` or ``"cross_entropy"``.
        label_smoothing: for ``"cross_entropy"`` only.
        temperature: of the softmax.
        slot_mask: slots that are present.
        reduction: ``"none"`` (0 where unselected), ``"sum"`` or ``"mean"``.
    """
    value: Tensor
    value, *_ = _ops.differentiable_distill(
        logits, target, region, slot_mask, criterion, label_smoothing, temperature, reduction
    )
    return value


def _number_or_tensor(threshold: float | Tensor | None) -> tuple[float | None, Tensor | None]:
    """Put a threshold where an operator of torch takes it."""
    return (None, threshold.detach()) if isinstance(threshold, Tensor) else (threshold, None)
