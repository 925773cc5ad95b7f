"""Two operators of torch: compare one map with labels on a region, and its backward."""

from typing import Any

import torch
from torch import Tensor

from ssync_loss._autograd import differentiable, once_differentiable
from ssync_loss.ssync.engines.triton import _launch
from ssync_loss.ssync.engines.triton._launch import criterion_of
from ssync_loss.ssync.engines.triton._tiling import NUM_WARPS, Tiling, masked, strided


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
    """Return the loss, int8 targets (B, T, H, W), and the factor of a scalar loss's gradient."""
    from ssync_loss.ssync.engines.triton.gpu.distill import distill_kernel, finish_distill_kernel

    value, targets, scale = outputs = _new_distillation(logits, reduction)
    by_patch = reduction == "none"
    tiling, settings = Tiling.of(logits), criterion_of(criterion, label_smoothing, temperature)
    errors, tallies = _launch.shares(logits, 1, tiling)
    num_programs = errors.shape[1]
    with torch.cuda.device_of(logits):
        if num_programs:
            _launch.launch(
                distill_kernel,
                tiling.num_tiles if by_patch else num_programs,
                *(strided(logits), masked(slot_mask), strided(target), strided(region), targets),
                *(value if by_patch else None, errors, tallies, settings, tiling.shape, tiling.num_tiles),
                **tiling.constants,
                OVER_SLOTS=_over_slots(criterion, reduction),
            )
        if not by_patch:
            _launch.launch(
                finish_distill_kernel,
                1,
                *(errors, tallies, value, scale, settings, num_programs),
                PROGRAMS=_launch.SHARES_AT_ONCE,
                MEAN=reduction == "mean",
                num_warps=NUM_WARPS,
            )
    return outputs


distill.register_fake(lambda logits, *settings: _new_distillation(logits, settings[-1]))


def _new_distillation(logits: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    num_clips, num_frames, _, height, width = logits.shape
    patches = (num_clips, num_frames, height, width)
    return (
        logits.new_empty(patches if reduction == "none" else (), dtype=torch.float32),
        logits.new_empty(patches, dtype=torch.int8),
        logits.new_empty(0 if reduction == "none" else 1, dtype=torch.float32),
    )


def _over_slots(criterion: str, reduction: str) -> bool:
    """Tell whether a patch's value is a mean over slots; a batch's mean divides by patches and slots in one step."""
    return criterion == "mse" and reduction != "mean"


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
    """Return the gradient of the logits: 1 launch."""
    from ssync_loss.ssync.engines.triton.gpu.distill import distill_gradient_kernel

    grad_logits = torch.empty_like(logits)
    if logits.shape[0]:
        tiling = Tiling.of(logits)
        by_patch = reduction == "none"
        with torch.cuda.device_of(logits):
            _launch.launch(
                distill_gradient_kernel,
                tiling.num_tiles,
                *(strided(logits), masked(slot_mask), targets, None if by_patch else scale),
                *(strided(grad) if by_patch else grad, strided(grad_logits)),
                *(criterion_of(criterion, label_smoothing, temperature), tiling.shape),
                **tiling.constants,
                OVER_SLOTS=_over_slots(criterion, reduction),
            )
    return grad_logits


distill_backward.register_fake(lambda _, logits, *__: torch.empty_like(logits))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, _, slot_mask, *ctx.settings = inputs
    _, targets, scale = output
    ctx.mark_non_differentiable(targets, scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, scale, slot_mask)


@once_differentiable
def _derive(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    wanted = grad is not None and ctx.needs_input_grad[0]
    return distill_backward(grad, *ctx.saved_tensors, *ctx.settings) if wanted else None, *(None,) * 7


differentiable_distill = differentiable(distill, distill, _save, _derive)
