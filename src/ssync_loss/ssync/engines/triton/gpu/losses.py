"""Third pass over both maps: the loss, in partial sums that are added in a fixed order."""

import triton
import triton.language as tl

from ssync_loss.ssync.engines.triton.gpu.softmax import patch_values
from ssync_loss.ssync.engines.triton.gpu.targets import INVALID
from ssync_loss.ssync.engines.triton.gpu.tiles import locate, present_slots, read_tile


@triton.jit
def loss_kernel(
    enc,
    enc_strides,
    dec,
    dec_strides,
    slot_mask,
    mask_strides,
    targets,
    errors,
    tallies,
    softness,
    shape,
    plane_size,
    num_tiles,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENC_LAYOUT: tl.constexpr,
    DEC_LAYOUT: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
):
    """Write every program's share of the errors, and what it counted.

    ``errors`` (2, programs) float32 and ``tallies`` (2, 3, programs) int32 (selected patches, the same times
    present slots, whether a patch that counts is undefined): of what the decoder is taught, then of what the
    encoder is taught. One half of the programs reads each map.
    """
    program = tl.program_id(0)
    half = tl.num_programs(0) // 2
    if program < half:
        _sum_patches(
            dec, dec_strides, slot_mask, mask_strides, targets, errors, tallies, program, half,
            softness, shape, num_tiles, S, SLOTS, TILE, COLUMNS, DEC_LAYOUT, CROSS_ENTROPY, SMOOTHED,
        )  # fmt: skip
    else:
        _sum_patches(
            enc, enc_strides, slot_mask, mask_strides, targets + plane_size, errors + half, tallies + 3 * half,
            program - half, half,
            softness, shape, num_tiles, S, SLOTS, TILE, COLUMNS, ENC_LAYOUT, CROSS_ENTROPY, SMOOTHED,
        )  # fmt: skip


@triton.jit
def _sum_patches(
    maps,
    strides,
    slot_mask,
    mask_strides,
    targets,
    errors,
    tallies,
    program,
    num_programs,
    softness,
    shape,
    num_tiles,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    LAYOUT: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
):
    slots = tl.arange(0, SLOTS)
    error = tl.zeros([TILE], tl.float32)
    selected = tl.zeros([TILE], tl.int32)
    weighted = tl.zeros([TILE], tl.int32)
    undefined = tl.zeros([TILE], tl.int32)
    for tile in range(program, num_tiles, num_programs):
        row, clip, frame, patches, inside = locate(tile, shape, TILE, COLUMNS)
        target = tl.load(targets + row.to(tl.int64) * shape[1] + patches, mask=inside, other=INVALID).to(tl.int32)
        present, num_present = present_slots(slot_mask, mask_strides, clip, slots, S)
        x = read_tile(maps, strides, slot_mask, present, clip, frame, slots, patches, inside, shape, S, SLOTS, LAYOUT)
        value, is_defined = patch_values(x, target, slots, present, num_present, softness, CROSS_ENTROPY, SMOOTHED)
        taught = target >= 0
        error += tl.where(taught, value, 0.0)
        selected += taught.to(tl.int32)
        weighted += tl.where(taught, num_present, 0)
        # NaN and +inf count wherever a patch does, taught or not
        undefined |= tl.where(is_defined | (target == INVALID), 0, 1)
    write_share(errors, tallies, error, selected, weighted, undefined, program, num_programs)


@triton.jit
def write_share(errors, tallies, error, selected, weighted, undefined, program, num_programs):
    """Write what one program found, sums over its lanes."""
    tl.store(errors + program, tl.sum(error, 0))
    tl.store(tallies + program, tl.sum(selected, 0))
    tl.store(tallies + num_programs + program, tl.sum(weighted, 0))
    tl.store(tallies + 2 * num_programs + program, tl.max(undefined, 0))


@triton.jit
def add_shares(errors, tallies, num_programs, PROGRAMS: tl.constexpr):
    """Add up what all programs found, in float64 and int64."""
    error = tl.zeros([PROGRAMS], tl.float64)
    selected = tl.zeros([PROGRAMS], tl.int64)
    weighted = tl.zeros([PROGRAMS], tl.int64)
    undefined = tl.zeros([PROGRAMS], tl.int32)
    for first in range(0, num_programs, PROGRAMS):
        programs = first + tl.arange(0, PROGRAMS)
        known = programs < num_programs
        error += tl.load(errors + programs, mask=known, other=0.0)
        selected += tl.load(tallies + programs, mask=known, other=0)
        weighted += tl.load(tallies + num_programs + programs, mask=known, other=0)
        undefined |= tl.load(tallies + 2 * num_programs + programs, mask=known, other=0)
    return tl.sum(error, 0), tl.sum(selected, 0), tl.sum(weighted, 0), tl.max(undefined, 0) != 0


@triton.jit
def averaging(selected, weighted, CROSS_ENTROPY: tl.constexpr):
    """Return one over what a mean divides by: selected patches, for the squared error times present slots."""
    number = selected if CROSS_ENTROPY else weighted
    return 1.0 / tl.maximum(number, 1).to(tl.float64)


@triton.jit
def finish_kernel(
    errors,
    tallies,
    clean,
    total,
    boundary,
    interior,
    num_boundary,
    num_interior,
    scales,
    boundary_weight,
    interior_weight,
    num_programs,
    PROGRAMS: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
):
    """Add up the shares: both means and their weighted total, both counts, and what the gradients are scaled by.

    ``scales`` (2,) are one over what each mean divides by, NaN where a map held NaN or +inf, as the means are.
    """
    error, selected, weighted, undefined = add_shares(errors, tallies, num_programs, PROGRAMS)
    enc_error, enc_selected, enc_weighted, enc_undefined = add_shares(
        errors + num_programs, tallies + 3 * num_programs, num_programs, PROGRAMS
    )
    is_dirty = undefined | enc_undefined
    if clean is not None:
        is_dirty = is_dirty | (tl.load(clean) == 0)
    scale = tl.where(is_dirty, float("nan"), averaging(selected, weighted, CROSS_ENTROPY))
    enc_scale = tl.where(is_dirty, float("nan"), averaging(enc_selected, enc_weighted, CROSS_ENTROPY))
    mean = (error * scale).to(tl.float32)
    enc_mean = (enc_error * enc_scale).to(tl.float32)
    tl.store(boundary, mean)
    tl.store(interior, enc_mean)
    tl.store(total, boundary_weight * mean + interior_weight * enc_mean)
    tl.store(num_boundary, selected)
    tl.store(num_interior, enc_selected)
    tl.store(scales, scale.to(tl.float32))
    tl.store(scales + 1, enc_scale.to(tl.float32))
