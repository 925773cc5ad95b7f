"""The kernels as operators of torch: opaque to compilers, with shapes for fake tensors and with gradients."""

from typing import Any, TypeAlias

import torch
from torch import Tensor

from ssync_loss._autograd import differentiable, once_differentiable
from ssync_loss.ssync.engines.triton._launch import (
    Criterion,
    Regions,
    compute_distillation,
    compute_distillation_gradient,
    compute_gradients,
    compute_loss,
    find_labels,
    find_representatives,
    find_targets,
)
from ssync_loss.ssync.engines.triton._tiling import Tiling

# targets, and the five of PseudoLabels
Labels: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
# total, boundary, interior, num_boundary, num_interior, scales
Losses: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("ssync_loss::label", mutates_args=())
def label(
    enc: Tensor,
    dec: Tensor,
    valid: Tensor | None,
    slot_mask: Tensor | None,
    merge_threshold: float | None,
    threshold_tensor: Tensor | None,
    min_different: int,
    min_same: int,
    max_different: int,
    with_targets: bool,
    with_labels: bool,
) -> Labels:
    """Return int8 targets (2, B, T, H, W) and the five tensors of ``PseudoLabels``; empty what is not wanted.

    The threshold is a number, or a tensor, or neither: nothing is merged.
    """
    threshold = merge_threshold if threshold_tensor is None else threshold_tensor.float()
    targets, *labels = outputs = _new_labels(enc, with_targets, with_labels)
    if enc.shape[0]:
        with torch.cuda.device_of(enc):
            tiling = Tiling.of(enc)
            found = find_labels(tiling, enc, dec, valid, slot_mask, merges=threshold is not None)
            table = None
            if threshold is not None:
                table = find_representatives(tiling, enc, slot_mask, found, threshold)
            find_targets(
                tiling,
                found.planes,
                table,
                Regions(min_different, min_same, max_different),
                targets if with_targets else None,
                labels if with_labels else None,
            )
    return outputs


@label.register_fake
def _(enc: Tensor, *settings: Any) -> Labels:
    *_, with_targets, with_labels = settings
    return _new_labels(enc, with_targets, with_labels)


def _new_labels(maps: Tensor, with_targets: bool, with_labels: bool) -> Labels:
    num_clips, num_frames, num_slots, height, width = maps.shape
    patches = (num_clips, num_frames, height, width) if with_labels else (0,)
    return (
        maps.new_empty((2, num_clips, num_frames, height, width) if with_targets else 0, dtype=torch.int8),
        maps.new_empty(patches, dtype=torch.int64),
        maps.new_empty(patches, dtype=torch.int64),
        maps.new_empty(patches, dtype=torch.bool),
        maps.new_empty(patches, dtype=torch.bool),
        maps.new_empty((num_clips, num_slots) if with_labels else 0, dtype=torch.int64),
    )


@torch.library.custom_op("ssync_loss::loss", mutates_args=())
def loss(
    enc: Tensor,
    dec: Tensor,
    targets: Tensor,
    slot_mask: Tensor | None,
    clean: Tensor | None,
    criterion: str,
    label_smoothing: float,
    temperature: float,
    boundary_weight: float,
    interior_weight: float,
) -> Losses:
    """Return the weighted total, both means, both counts of selected patches, and the scales of the gradients."""
    with torch.cuda.device_of(enc):
        pays = Criterion(criterion, label_smoothing, temperature)
        weights = (boundary_weight, interior_weight)
        outputs = _new_losses(enc)
        compute_loss(Tiling.of(enc), enc, dec, slot_mask, targets, clean, pays, weights, outputs)
    return outputs


@loss.register_fake
def _(enc: Tensor, *_: Any) -> Losses:
    return _new_losses(enc)


def _new_losses(maps: Tensor) -> Losses:
    return (
        maps.new_empty((), dtype=torch.float32),
        maps.new_empty((), dtype=torch.float32),
        maps.new_empty((), dtype=torch.float32),
        maps.new_empty((), dtype=torch.int64),
        maps.new_empty((), dtype=torch.int64),
        maps.new_empty(2, dtype=torch.float32),
    )


@torch.library.custom_op("ssync_loss::loss_backward", mutates_args=())
def loss_backward(
    grad_total: Tensor | None,
    grad_boundary: Tensor | None,
    grad_interior: Tensor | None,
    enc: Tensor,
    dec: Tensor,
    targets: Tensor,
    slot_mask: Tensor | None,
    scales: Tensor,
    criterion: str,
    label_smoothing: float,
    temperature: float,
    boundary_weight: float,
    interior_weight: float,
    for_enc: bool,
    for_dec: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of both maps; empty what is not wanted."""
    grad_enc, grad_dec = _new_gradient(enc, for_enc), _new_gradient(dec, for_dec)
    if enc.shape[0]:
        with torch.cuda.device_of(enc):
            compute_gradients(
                Tiling.of(enc),
                enc,
                dec,
                slot_mask,
                targets,
                scales,
                (grad_total, grad_boundary, grad_interior),
                grad_enc if for_enc else None,
                grad_dec if for_dec else None,
                Criterion(criterion, label_smoothing, temperature),
                (boundary_weight, interior_weight),
            )
    return grad_enc, grad_dec


@loss_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    _, _, _, enc, dec, *_, for_enc, for_dec = arguments
    return _new_gradient(enc, for_enc), _new_gradient(dec, for_dec)


def _new_gradient(maps: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(maps) if wanted else maps.new_empty(0)


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: Losses) -> None:
    enc, dec, targets, slot_mask, _, *ctx.settings = inputs
    *_, num_boundary, num_interior, scales = output
    for_enc, for_dec, *_ = ctx.needs_input_grad
    ctx.mark_non_differentiable(num_boundary, num_interior, scales)
    # or autograd fills zeros for outputs that nobody differentiates: a launch each
    ctx.set_materialize_grads(False)
    # a map that learns nothing is not kept: the other stands in its place, and is not read there
    ctx.save_for_backward(enc if for_enc else dec, dec if for_dec else enc, targets, slot_mask, scales)


@once_differentiable
def _loss_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_total, grad_boundary, grad_interior, *_ = grads
    for_enc = ctx.needs_input_grad[0] and not (grad_total is None and grad_interior is None)
    for_dec = ctx.needs_input_grad[1] and not (grad_total is None and grad_boundary is None)
    grad_enc = grad_dec = None
    if for_enc or for_dec:
        incoming = (grad_total, grad_boundary, grad_interior)
        grad_enc, grad_dec = loss_backward(*incoming, *ctx.saved_tensors, *ctx.settings, for_enc, for_dec)
    nothing = [None] * 8
    return grad_enc if for_enc else None, grad_dec if for_dec else None, *nothing


differentiable_loss = differentiable(loss, loss, _save_loss, _loss_backward)


@torch.library.custom_op("ssync_loss::distill", mutates_args=())
def distill(
    logits: Tensor,
    target: Tensor,
    region: Tensor,
    slot_mask: Tensor | None,
    criterion: str,
    label_smoothing: float,
    temperature: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, int8 targets (B, T, H, W), and what the gradient of a scalar loss is scaled by."""
    outputs = _new_distillation(logits, reduction)
    with torch.cuda.device_of(logits):
        pays = Criterion(criterion, label_smoothing, temperature)
        compute_distillation(Tiling.of(logits), logits, target, region, slot_mask, pays, reduction, outputs)
    return outputs


@distill.register_fake
def _(logits: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, reduction = settings
    return _new_distillation(logits, reduction)


def _new_distillation(logits: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    num_clips, num_frames, _, height, width = logits.shape
    patches = (num_clips, num_frames, height, width)
    return (
        logits.new_empty(patches if reduction == "none" else (), dtype=torch.float32),
        logits.new_empty(patches, dtype=torch.int8),
        logits.new_empty(0 if reduction == "none" else 1, dtype=torch.float32),
    )


@torch.library.custom_op("ssync_loss::distill_backward", mutates_args=())
def distill_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    slot_mask: Tensor | None,
    criterion: str,
    label_smoothing: float,
    temperature: float,
    reduction: str,
) -> Tensor:
    """Return the gradient of the logits."""
    grad_logits = torch.empty_like(logits)
    if logits.shape[0]:
        with torch.cuda.device_of(logits):
            pays = Criterion(criterion, label_smoothing, temperature)
            compute_distillation_gradient(
                Tiling.of(logits), grad, logits, targets, scale, slot_mask, grad_logits, pays, reduction
            )
    return grad_logits


@distill_backward.register_fake
def _(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:  # noqa: ARG001 (the operator has it)
    return torch.empty_like(logits)


def _save_distillation(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, _, slot_mask, *ctx.settings = inputs
    _, targets, scale = output
    ctx.mark_non_differentiable(targets, scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, scale, slot_mask)


@once_differentiable
def _distill_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    wanted = grad is not None and ctx.needs_input_grad[0]
    grad_logits = distill_backward(grad, *ctx.saved_tensors, *ctx.settings) if wanted else None
    nothing = [None] * 7
    return grad_logits, *nothing


differentiable_distill = differentiable(distill, distill, _save_distillation, _distill_backward)
