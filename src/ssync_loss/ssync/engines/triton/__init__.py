"""SSync as Triton kernels: 7 launches from two maps to both gradients.

How they work is told in the README beside this file. Nothing here is public: the library's functions and modules
come here when their ``backend`` says so. ``triton`` is imported when a kernel is launched first.
"""

from typing import Literal

from torch import Tensor

from ssync_loss._types import PseudoLabels, Terms
from ssync_loss.kernels import _ops
from ssync_loss.kernels._facts import MAX_SLOTS, missing

__all__ = ["MAX_SLOTS", "distill", "missing", "pseudo_labels", "step"]


def step(
    enc: Tensor,
    dec: Tensor,
    *,
    valid: Tensor | None,
    slot_mask: Tensor | None,
    clean: Tensor | None,
    merge_threshold: float | None,
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
        merge_threshold: the overlap above which slots are merged, or None.
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
        merge_threshold,
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
    merge_threshold: float | None,
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
        merge_threshold,
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
