"""The loss of one map with labels and a region from outside, on its own: both directions."""

import triton
import triton.language as tl

from ssync_loss.ssync.engines.triton.gpu.gradients import write_slopes
from ssync_loss.ssync.engines.triton.gpu.losses import add_shares, averaging, write_share
from ssync_loss.ssync.engines.triton.gpu.softmax import patch_values
from ssync_loss.ssync.engines.triton.gpu.tiles import locate, patch_cells, present_slots, read_tile


@triton.jit
def distill_kernel(
    logits,
    strides,
    slot_mask,
    mask_strides,
    target,
    target_strides,
    region,
    region_strides,
    targets,
    values,
    errors,
    tallies,
    softness,
    shape,
    num_tiles,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    LAYOUT: tl.constexpr,
    TARGET_LAYOUT: tl.constexpr,
    REGION_LAYOUT: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    OVER_SLOTS: tl.constexpr,
):
    """Write int8 ``targets`` (B, T, H, W), -1 where unselected, and what is asked for of the patches' values.

    Either ``values`` (B, T, H, W), 0 where unselected, or the shares ``errors`` (programs) and ``tallies``
    (3, programs); the other is None. With OVER_SLOTS a patch's squared error is a mean over present slots.
    """
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    slots = tl.arange(0, SLOTS)
    error = tl.zeros([TILE], tl.float32)
    selected = tl.zeros([TILE], tl.int32)
    weighted = tl.zeros([TILE], tl.int32)
    for tile in range(program, num_tiles, num_programs):
        row, clip, frame, patches, inside = locate(tile, shape, TILE, COLUMNS)
        at = row.to(tl.int64) * shape[1] + patches
        present, num_present = present_slots(slot_mask, mask_strides, clip, slots, S)
        cells = patch_cells(region, region_strides, clip, frame, patches, shape, REGION_LAYOUT)
        taught = inside & (tl.load(cells, mask=inside, other=0) != 0)
        if slot_mask is not None:
            # a clip without slots has nothing to teach
            taught = taught & (tl.max(present.to(tl.int32), 0) > 0)
        cells = patch_cells(target, target_strides, clip, frame, patches, shape, TARGET_LAYOUT)
        label = tl.load(cells, mask=inside, other=0)
        names_slot = (label >= 0) & (label < S)
        label = tl.where(taught & names_slot, label.to(tl.int32), -1)
        x = read_tile(logits, strides, slot_mask, present, clip, frame, slots, patches, inside, shape, S, SLOTS, LAYOUT)
        value, _ = patch_values(x, label, slots, present, num_present, softness, CROSS_ENTROPY, SMOOTHED)
        if OVER_SLOTS:
            value = value / num_present
        # a label out of range cannot be found in time to complain
        value = tl.where(names_slot, value, float("nan"))
        value = tl.where(taught, value, 0.0)
        tl.store(targets + at, label.to(tl.int8), mask=inside)
        if values is None:
            error += value
            selected += taught.to(tl.int32)
            weighted += tl.where(taught, num_present, 0)
        else:
            tl.store(values + at, value, mask=inside)
    if values is None:
        write_share(errors, tallies, error, selected, weighted, tl.zeros([TILE], tl.int32), program, num_programs)


@triton.jit
def finish_distill_kernel(
    errors,
    tallies,
    loss,
    scale,
    num_programs,
    PROGRAMS: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Add up the shares: a sum or a mean, and what its gradient is scaled by."""
    error, selected, weighted, _ = add_shares(errors, tallies, num_programs, PROGRAMS)
    factor = tl.full([], 1.0, tl.float64)
    if MEAN:
        factor = averaging(selected, weighted, CROSS_ENTROPY)
    tl.store(loss, (error * factor).to(tl.float32))
    tl.store(scale, factor.to(tl.float32))


@triton.jit
def distill_gradient_kernel(
    logits,
    strides,
    slot_mask,
    mask_strides,
    targets,
    scale,
    grad,
    grad_strides,
    grad_logits,
    grad_logits_strides,
    softness,
    shape,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GRAD_LAYOUT: tl.constexpr,
    GRAD_LOGITS_LAYOUT: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    OVER_SLOTS: tl.constexpr,
):
    """Write ``grad_logits`` from the gradient of a scalar loss, with its scale, or of values (B, T, H, W)."""
    tile = tl.program_id(0)
    _, clip, frame, patches, inside = locate(tile, shape, TILE, COLUMNS)
    if scale is None:
        cells = patch_cells(grad, grad_strides, clip, frame, patches, shape, GRAD_LAYOUT)
        upstream = tl.load(cells, mask=inside, other=0.0)
    else:
        upstream = tl.load(grad) * tl.load(scale)
    if OVER_SLOTS:
        _, num_present = present_slots(slot_mask, mask_strides, clip, tl.arange(0, SLOTS), S)
        upstream = upstream / num_present
    write_slopes(
        logits, strides, slot_mask, mask_strides, targets, upstream, 0.0, grad_logits, grad_logits_strides, tile,
        softness, shape, S, SLOTS, TILE, COLUMNS, LAYOUT, GRAD_LOGITS_LAYOUT, CROSS_ENTROPY, SMOOTHED,
    )  # fmt: skip
