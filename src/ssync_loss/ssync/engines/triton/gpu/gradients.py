"""Last pass over both maps: their gradients, from the logits once more and the int8 targets of the forward."""

import triton
import triton.language as tl

from ssync_loss.ssync.engines.triton.gpu.softmax import patch_slopes
from ssync_loss.ssync.engines.triton.gpu.tiles import locate, map_cells, present_slots, read_tile, tile_mask


@triton.jit
def gradient_kernel(
    enc,
    enc_strides,
    dec,
    dec_strides,
    slot_mask,
    mask_strides,
    targets,
    scales,
    grad_total,
    grad_boundary,
    grad_interior,
    grad_enc,
    grad_enc_strides,
    grad_dec,
    grad_dec_strides,
    boundary_weight,
    interior_weight,
    softness,
    shape,
    plane_size,
    num_dec_programs,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENC_LAYOUT: tl.constexpr,
    DEC_LAYOUT: tl.constexpr,
    GRAD_ENC_LAYOUT: tl.constexpr,
    GRAD_DEC_LAYOUT: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
):
    """Write ``grad_dec`` with the first ``num_dec_programs``, ``grad_enc`` with the others; either may have none.

    Incoming gradients that are None are zero.
    """
    program = tl.program_id(0)
    if program < num_dec_programs:
        upstream = _upstream(scales, grad_total, boundary_weight, grad_boundary)
        write_slopes(
            dec, dec_strides, slot_mask, mask_strides, targets, upstream, _nan_or_zero(upstream), grad_dec,
            grad_dec_strides, program,
            softness, shape, S, SLOTS, TILE, COLUMNS, DEC_LAYOUT, GRAD_DEC_LAYOUT, CROSS_ENTROPY, SMOOTHED,
        )  # fmt: skip
    else:
        upstream = _upstream(scales + 1, grad_total, interior_weight, grad_interior)
        write_slopes(
            enc, enc_strides, slot_mask, mask_strides, targets + plane_size, upstream, _nan_or_zero(upstream),
            grad_enc, grad_enc_strides, program - num_dec_programs,
            softness, shape, S, SLOTS, TILE, COLUMNS, ENC_LAYOUT, GRAD_ENC_LAYOUT, CROSS_ENTROPY, SMOOTHED,
        )  # fmt: skip


@triton.jit
def _upstream(scale, grad_total, weight, grad_term):
    upstream = 0.0
    if grad_total is not None:
        upstream += tl.load(grad_total) * weight
    if grad_term is not None:
        upstream += tl.load(grad_term)
    return upstream * tl.load(scale)


@triton.jit
def _nan_or_zero(upstream):
    """Return NaN for NaN, as it comes where a map holds NaN or +inf: then no cell of a gradient means anything."""
    return tl.where(upstream == upstream, 0.0, upstream)  # noqa: PLR0124 (only NaN is not itself)


@triton.jit
def write_slopes(
    maps,
    strides,
    slot_mask,
    mask_strides,
    targets,
    upstream,
    elsewhere,
    grads,
    grad_strides,
    tile,
    softness,
    shape,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GRAD_LAYOUT: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
):
    """Write the gradient of one tile; patches that are not taught get the number ``elsewhere``, whatever they hold."""
    row, clip, frame, patches, inside = locate(tile, shape, TILE, COLUMNS)
    slots = tl.arange(0, SLOTS)
    target = tl.load(targets + row.to(tl.int64) * shape[1] + patches, mask=inside, other=-1).to(tl.int32)
    present, num_present = present_slots(slot_mask, mask_strides, clip, slots, S)
    x = read_tile(maps, strides, slot_mask, present, clip, frame, slots, patches, inside, shape, S, SLOTS, LAYOUT)
    slopes = patch_slopes(x, target, slots, present, num_present, upstream, softness, CROSS_ENTROPY, SMOOTHED)
    slopes = tl.where((target >= 0)[None, :], slopes, elsewhere)
    cells = map_cells(grads, grad_strides, clip, frame, slots, patches, shape, GRAD_LAYOUT)
    tl.store(cells, slopes.to(grads.dtype.element_ty), mask=tile_mask(slots, inside, S, SLOTS))
