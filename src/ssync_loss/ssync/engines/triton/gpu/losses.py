"""Third pass over both maps: the loss, as partial sums that are added in a fixed order."""

import triton
import triton.language as tl

from ssync_loss.ssync.engines.triton.gpu.softmax import patch_values
from ssync_loss.ssync.engines.triton.gpu.targets import INVALID
from ssync_loss.ssync.engines.triton.gpu.tiles import in_plane, locate, read_tile, slots_of


@triton.jit
def loss_kernel(
    enc,
    dec,
    slot_mask,
    targets,
    errors,
    tallies,
    criterion,
    shape,
    plane_size,
    num_tiles,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write every program's share of the errors and of three counts.

    ``errors`` are (2, programs) float32, ``tallies`` (2, 3, programs) int32: selected patches, selected patches times
    present slots, and whether a valid patch is undefined. The first axis is the student: the decoder, then the encoder.
    The first half of the programs reads the decoder's map, the second half the encoder's.
    """
    program = tl.program_id(0)
    half = tl.num_programs(0) // 2
    if program < half:
        share = (errors, tallies, program, half)
        _sum_patches(dec, slot_mask, targets, share, criterion, shape, num_tiles, S, SLOTS, TILE, COLUMNS)
    else:
        targets += plane_size
        share = (errors + half, tallies + 3 * half, program - half, half)
        _sum_patches(enc, slot_mask, targets, share, criterion, shape, num_tiles, S, SLOTS, TILE, COLUMNS)


@triton.jit
def _sum_patches(
    maps,
    slot_mask,
    targets,
    share,
    criterion,
    shape,
    num_tiles,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    error = tl.zeros([TILE], tl.float32)
    selected = tl.zeros([TILE], tl.int32)
    weighted = tl.zeros([TILE], tl.int32)
    undefined = tl.zeros([TILE], tl.int32)
    for tile in range(share[2], num_tiles, share[3]):
        place = locate(tile, shape, TILE, COLUMNS)
        target = tl.load(targets + in_plane(place, shape), mask=place[3], other=INVALID).to(tl.int32)
        slots = slots_of(slot_mask, place[0], S, SLOTS)
        x = read_tile(maps, slot_mask, slots, place, shape, S, SLOTS)
        value, is_defined = patch_values(x, target, slots, criterion)
        taught = target >= 0
        error += tl.where(taught, value, 0.0)
        selected += taught.to(tl.int32)
        weighted += tl.where(taught, slots[2], 0)
        # NaN or +inf in any valid patch, taught or not, makes the loss NaN
        undefined |= tl.where(is_defined | (target == INVALID), 0, 1)
    write_share(share, error, selected, weighted, undefined)


@triton.jit
def write_share(share, error, selected, weighted, undefined):
    """Write the sums of one program. ``share`` holds both arrays, the program, and the number of programs."""
    errors, tallies, program, num_programs = share
    tl.store(errors + program, tl.sum(error, 0))
    tl.store(tallies + program, tl.sum(selected, 0))
    tl.store(tallies + num_programs + program, tl.sum(weighted, 0))
    tl.store(tallies + 2 * num_programs + program, tl.max(undefined, 0))


@triton.jit
def add_shares(errors, tallies, num_programs, criterion, PROGRAMS: tl.constexpr):
    """Add up the shares of all programs, in float64 and int64.

    Returns the error, the number of selected patches, the inverse of the divisor of the mean (selected patches, for the
    squared error times present slots), and whether a patch is undefined.
    """
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
    number = tl.sum(selected, 0)
    divisor = tl.sum(weighted, 0) if criterion[2] is None else number
    return tl.sum(error, 0), number, 1.0 / tl.maximum(divisor, 1).to(tl.float64), tl.max(undefined, 0) != 0


@triton.jit
def finish_kernel(errors, tallies, clean, outputs, weights, criterion, num_programs, PROGRAMS: tl.constexpr):
    """Add up the shares, and write the weighted total, both means, both counts, and the factors of the gradients.

    The factors are the inverse divisors of the means. If a map holds NaN or +inf, the factors and the means are NaN.
    """
    error, selected, scale, undefined = add_shares(errors, tallies, num_programs, criterion, PROGRAMS)
    errors += num_programs
    tallies += 3 * num_programs
    enc_error, enc_selected, enc_scale, enc_undefined = add_shares(errors, tallies, num_programs, criterion, PROGRAMS)
    is_dirty = undefined | enc_undefined
    if clean is not None:
        is_dirty = is_dirty | (tl.load(clean) == 0)
    scale = tl.where(is_dirty, float("nan"), scale)
    enc_scale = tl.where(is_dirty, float("nan"), enc_scale)
    mean = (error * scale).to(tl.float32)
    enc_mean = (enc_error * enc_scale).to(tl.float32)
    total, boundary, interior, num_boundary, num_interior, scales = outputs
    tl.store(total, weights[0] * mean + weights[1] * enc_mean)
    tl.store(boundary, mean)
    tl.store(interior, enc_mean)
    tl.store(num_boundary, selected)
    tl.store(num_interior, enc_selected)
    tl.store(scales, scale.to(tl.float32))
    tl.store(scales + 1, enc_scale.to(tl.float32))
