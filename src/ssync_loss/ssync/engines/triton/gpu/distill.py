"""Distillation of one map with given labels and a given region: forward and backward."""

import triton
import triton.language as tl

from ssync_loss.ssync.engines.triton.gpu.gradients import write_slopes
from ssync_loss.ssync.engines.triton.gpu.losses import add_shares, write_share
from ssync_loss.ssync.engines.triton.gpu.softmax import patch_values
from ssync_loss.ssync.engines.triton.gpu.tiles import in_plane, locate, read_patches, read_tile, slots_of


@triton.jit
def distill_kernel(
    logits,
    slot_mask,
    target,
    region,
    targets,
    values,
    errors,
    tallies,
    criterion,
    shape,
    num_tiles,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVER_SLOTS: tl.constexpr,
):
    """Write int8 ``targets`` (B, T, H, W), -1 where unselected, and either values of patches or sums of values.

    ``values`` are (B, T, H, W), 0 where unselected. If ``values`` is None, every program writes its sums to ``errors``
    (programs) and ``tallies`` (3, programs). With OVER_SLOTS a patch's squared error is a mean over present slots.
    """
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    error = tl.zeros([TILE], tl.float32)
    selected = tl.zeros([TILE], tl.int32)
    weighted = tl.zeros([TILE], tl.int32)
    for tile in range(program, num_tiles, num_programs):
        place = locate(tile, shape, TILE, COLUMNS)
        at = in_plane(place, shape)
        inside = place[3]
        slots = slots_of(slot_mask, place[0], S, SLOTS)
        taught = inside & (read_patches(region, place, shape) != 0)
        if slot_mask is not None:
            # a clip without a present slot teaches nothing
            taught = taught & (tl.max(slots[1].to(tl.int32), 0) > 0)
        label = read_patches(target, place, shape)
        names_slot = (label >= 0) & (label < S)
        label = tl.where(taught & names_slot, label.to(tl.int32), -1)
        x = read_tile(logits, slot_mask, slots, place, shape, S, SLOTS)
        value, _ = patch_values(x, label, slots, criterion)
        if OVER_SLOTS:
            value = value / slots[2]
        # raising an error would have to wait for the device
        value = tl.where(names_slot, value, float("nan"))
        value = tl.where(taught, value, 0.0)
        tl.store(targets + at, label.to(tl.int8), mask=inside)
        if values is None:
            error += value
            selected += taught.to(tl.int32)
            weighted += tl.where(taught, slots[2], 0)
        else:
            tl.store(values + at, value, mask=inside)
    if values is None:
        share = (errors, tallies, program, num_programs)
        write_share(share, error, selected, weighted, tl.zeros([TILE], tl.int32))


@triton.jit
def finish_distill_kernel(
    errors, tallies, loss, scale, criterion, num_programs, PROGRAMS: tl.constexpr, MEAN: tl.constexpr
):
    """Add up the shares, and write the sum or mean and the factor of its gradient."""
    error, _, factor, _ = add_shares(errors, tallies, num_programs, criterion, PROGRAMS)
    if not MEAN:
        factor = tl.full([], 1.0, tl.float64)
    tl.store(loss, (error * factor).to(tl.float32))
    tl.store(scale, factor.to(tl.float32))


@triton.jit
def distill_gradient_kernel(
    logits,
    slot_mask,
    targets,
    scale,
    grad,
    grad_logits,
    criterion,
    shape,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVER_SLOTS: tl.constexpr,
):
    """Write ``grad_logits``. ``grad`` is the gradient of a scalar loss with a ``scale``, or of values (B, T, H, W)."""
    place = locate(tl.program_id(0), shape, TILE, COLUMNS)
    upstream = read_patches(grad, place, shape) if scale is None else tl.load(grad) * tl.load(scale)
    if OVER_SLOTS:
        upstream = upstream / slots_of(slot_mask, place[0], S, SLOTS)[2]
    write_slopes(logits, slot_mask, targets, upstream, 0.0, grad_logits, place, criterion, shape, S, SLOTS)
