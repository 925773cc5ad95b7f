"""First pass over both maps: hard labels of every patch, and sums of the encoder's slots."""

import triton
import triton.language as tl

from ssync_loss.ssync.engines.triton.gpu.tiles import in_plane, patches_of, read_patches, read_tile, slots_of


@triton.jit
def label_kernel(
    enc,
    dec,
    valid,
    slot_mask,
    labels,
    parts,
    shape,
    plane_size,
    num_parts,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write int8 labels (2, B, T, H, W), the encoder's and the decoder's, -1 at invalid patches.

    The first half of the programs reads the encoder's map, the second half the decoder's map. ``num_parts`` programs
    share a clip of a map. A program of the encoder's map writes one of the ``parts``: sums of slots over valid patches,
    (B, parts, S) float32, and the number of these patches, (B, parts) int32. ``parts`` is None without merging.
    """
    program = tl.program_id(0)
    half = tl.num_programs(0) // 2
    if program < half:
        _label(enc, valid, slot_mask, labels, parts, program, shape, num_parts, S, SLOTS, TILE, COLUMNS)
    else:
        program -= half
        _label(dec, valid, slot_mask, labels + plane_size, None, program, shape, num_parts, S, SLOTS, TILE, COLUMNS)


@triton.jit
def _label(
    maps,
    valid,
    slot_mask,
    labels,
    parts,
    program,
    shape,
    num_parts,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    clip = program // num_parts
    slots = slots_of(slot_mask, clip, S, SLOTS)
    number, present, _ = slots
    # a clip without a present slot is invalid throughout
    has_slots = tl.max(present.to(tl.int32), 0) > 0
    total = tl.zeros([SLOTS, TILE], tl.float32)
    counted = tl.zeros([TILE], tl.int32)
    for tile in range(program % num_parts, shape[0] * shape[3], num_parts):
        patches, inside = patches_of(tile % shape[3], shape, TILE, COLUMNS)
        place = (clip, tile // shape[3], patches, inside)
        counts = inside & has_slots
        if valid is not None:
            counts = counts & (read_patches(valid, place, shape) != 0)
        x = read_tile(maps, slot_mask, slots, place, shape, S, SLOTS)
        # NaN fails this comparison: it becomes +inf, so that the label is a present slot
        x = tl.where(x <= float("inf"), x, float("inf"))
        leads = (x == tl.max(x, 0)[None, :]) & present[:, None]
        label = tl.min(tl.where(leads, number[:, None], SLOTS), 0)
        tl.store(labels + in_plane(place, shape), tl.where(counts, label, -1).to(tl.int8), mask=inside)
        if parts is not None:
            total += tl.where(counts[None, :], x, 0.0)
            counted += counts.to(tl.int32)
    if parts is not None:
        tl.store(parts[0] + program.to(tl.int64) * S + number, tl.sum(total, 1), mask=number < S)
        tl.store(parts[1] + program, tl.sum(counted, 0))
