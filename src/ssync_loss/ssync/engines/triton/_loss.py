"""Two operators of torch: the loss of both maps with given targets, and its backward."""

from typing import Any, TypeAlias

import torch
from torch import Tensor

from ssync_loss._autograd import differentiable, once_differentiable
from ssync_loss.ssync.engines.triton import _launch
from ssync_loss.ssync.engines.triton._launch import criterion_of
from ssync_loss.ssync.engines.triton._tiling import NUM_WARPS, Tiling, masked, strided

# total, boundary, interior, num_boundary, num_interior, scales
Losses: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


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
    """Return the weighted total, both means, both counts of selected patches, and the factors of the gradients.

    2 launches. ``clean`` is False if NaN or +inf was found before resizing.
    """
    from ssync_loss.ssync.engines.triton.gpu.losses import finish_kernel, loss_kernel

    tiling, settings = Tiling.of(enc), criterion_of(criterion, label_smoothing, temperature)
    outputs = _new_losses(enc)
    errors, tallies = _launch.shares(enc, 2, tiling)
    num_programs = errors.shape[1]
    with torch.cuda.device_of(enc):
        if num_programs:
            _launch.launch(
                loss_kernel,
                2 * num_programs,
                *(strided(enc), strided(dec), masked(slot_mask), targets, errors, tallies),
                *(settings, tiling.shape, tiling.plane_size, tiling.num_tiles),
                **tiling.constants,
            )
        _launch.launch(
            finish_kernel,
            1,
            *(errors, tallies, clean, outputs, (boundary_weight, interior_weight), settings, num_programs),
            PROGRAMS=_launch.SHARES_AT_ONCE,
            num_warps=NUM_WARPS,
        )
    return outputs


loss.register_fake(lambda enc, *_: _new_losses(enc))


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
    """Return the gradients of both maps, empty if not wanted: 1 launch."""
    from ssync_loss.ssync.engines.triton.gpu.gradients import gradient_kernel

    grad_enc, grad_dec = _new_gradient(enc, for_enc), _new_gradient(dec, for_dec)
    if enc.shape[0]:
        tiling = Tiling.of(enc)
        # a gradient that is not wanted has no programs; no kernel writes the tensor passed in its place
        num_dec = tiling.num_tiles * for_dec
        with torch.cuda.device_of(enc):
            _launch.launch(
                gradient_kernel,
                num_dec + tiling.num_tiles * for_enc,
                *(strided(enc), strided(dec), masked(slot_mask), targets, scales),
                *((grad_total, grad_boundary, grad_interior), strided(grad_enc if for_enc else enc)),
                *(strided(grad_dec if for_dec else dec), (boundary_weight, interior_weight)),
                *(criterion_of(criterion, label_smoothing, temperature), tiling.shape, tiling.plane_size, num_dec),
                **tiling.constants,
            )
    return grad_enc, grad_dec


@loss_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    _, _, _, enc, dec, *_, for_enc, for_dec = arguments
    return _new_gradient(enc, for_enc), _new_gradient(dec, for_dec)


def _new_gradient(maps: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(maps) if wanted else maps.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Losses) -> None:
    enc, dec, targets, slot_mask, _, *ctx.settings = inputs
    *_, num_boundary, num_interior, scales = output
    for_enc, for_dec, *_ = ctx.needs_input_grad
    ctx.mark_non_differentiable(num_boundary, num_interior, scales)
    # autograd would fill zeros for unused outputs, one launch each
    ctx.set_materialize_grads(False)
    # a map without a gradient is not saved; the other map fills its place, where nothing reads it
    ctx.save_for_backward(enc if for_enc else dec, dec if for_dec else enc, targets, slot_mask, scales)


@once_differentiable
def _derive(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    total, boundary, interior, *_ = grads
    for_enc = ctx.needs_input_grad[0] and not (total is None and interior is None)
    for_dec = ctx.needs_input_grad[1] and not (total is None and boundary is None)
    grad_enc = grad_dec = None
    if for_enc or for_dec:
        grad_enc, grad_dec = loss_backward(*grads[:3], *ctx.saved_tensors, *ctx.settings, for_enc, for_dec)
    return grad_enc if for_enc else None, grad_dec if for_dec else None, *(None,) * 8


differentiable_loss = differentiable(loss, loss, _save, _derive)
