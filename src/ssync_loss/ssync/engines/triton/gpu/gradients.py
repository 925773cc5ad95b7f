"""Last pass over both maps: their gradients, from the logits and the int8 targets of the forward."""

import triton
import triton.language as tl

from ssync_loss.ssync.engines.triton.gpu.softmax import patch_slopes
from ssync_loss.ssync.engines.triton.gpu.tiles import in_plane, locate, map_cells, read_tile, slots_of, tile_mask


@triton.jit
def gradient_kernel(
    enc,
    dec,
    slot_mask,
    targets,
    scales,
    incoming,
    grad_enc,
    grad_dec,
    weights,
    criterion,
    shape,
    plane_size,
    num_dec_programs,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write ``grad_dec`` in the first ``num_dec_programs`` programs, and ``grad_enc`` in the other programs, if any.

    ``incoming`` are the gradients of the total and of both means; None is zero.
    """
    program = tl.program_id(0)
    if program < num_dec_programs:
        slope = _upstream(scales, incoming[0], weights[0], incoming[1])
        place = locate(program, shape, TILE, COLUMNS)
        write_slopes(dec, slot_mask, targets, slope, _nan_or_zero(slope), grad_dec, place, criterion, shape, S, SLOTS)
    else:
        slope = _upstream(scales + 1, incoming[0], weights[1], incoming[2])
        place = locate(program - num_dec_programs, shape, TILE, COLUMNS)
        targets += plane_size
        write_slopes(enc, slot_mask, targets, slope, _nan_or_zero(slope), grad_enc, place, criterion, shape, S, SLOTS)


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
    """Return NaN for NaN, else 0. ``upstream`` is NaN if a map holds NaN or +inf: all of the gradient becomes NaN."""
    return tl.where(upstream == upstream, 0.0, upstream)  # noqa: PLR0124 (only NaN differs from itself)


@triton.jit
def write_slopes(
    maps, slot_mask, targets, upstream, elsewhere, grads, place, criterion, shape, S: tl.constexpr, SLOTS: tl.constexpr
):
    """Write the gradient of one tile; untaught patches get the number ``elsewhere``."""
    inside = place[3]
    target = tl.load(targets + in_plane(place, shape), mask=inside, other=-1).to(tl.int32)
    slots = slots_of(slot_mask, place[0], S, SLOTS)
    x = read_tile(maps, slot_mask, slots, place, shape, S, SLOTS)
    slopes = patch_slopes(x, target, slots, upstream, criterion)
    slopes = tl.where((target >= 0)[None, :], slopes, elsewhere)
    cells = map_cells(grads, place, slots[0], shape)
    tl.store(cells, slopes.to(grads[0].dtype.element_ty), mask=tile_mask(slots[0], inside, S, SLOTS))
