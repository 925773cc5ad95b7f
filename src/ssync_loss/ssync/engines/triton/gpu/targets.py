"""Int8 targets of every patch, from merged labels and the two regions."""

import triton
import triton.language as tl

# targets that name no slot
UNSELECTED = tl.constexpr(-1)
INVALID = tl.constexpr(-2)


@triton.jit
def target_kernel(
    hard,
    table,
    targets,
    enc_written,
    dec_written,
    representative,
    regions,
    plane_size,
    size,
    num_tiles,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write int8 targets (2, B, T, H, W) of the decoder and of the encoder, and the fields of ``PseudoLabels``.

    A target is the slot that a map should learn at a patch, -1 at unselected patches, -2 at invalid patches. ``table``
    is None without merging. ``targets`` may be None, and so may the fields: merged labels and region of each map, and
    representatives. ``regions`` are the least and the largest number of differing neighbors at a boundary, and the
    largest number in an interior. ``size`` is frames, height and width.
    """
    program = tl.program_id(0)
    half = tl.num_programs(0) // 2
    if program < half:
        _select(hard, table, targets, enc_written, program, regions[0], regions[1], size, num_tiles, S, TILE)
        if representative is not None:
            _name(table, representative, program, num_tiles, S, SLOTS)
    else:
        if targets is not None:
            targets += plane_size
        hard += plane_size
        _select(hard, table, targets, dec_written, program - half, 0, regions[2], size, num_tiles, S, TILE)


@triton.jit
def _select(
    hard,
    table,
    targets,
    written,
    program,
    min_different,
    max_different,
    size,
    num_tiles,
    S: tl.constexpr,
    TILE: tl.constexpr,
):
    clip = (program // num_tiles).to(tl.int64)
    patches = program % num_tiles * TILE + tl.arange(0, TILE)
    num_patches = size[0] * size[1] * size[2]
    inside = patches < num_patches
    at = clip * num_patches + patches
    if table is not None:
        table += clip * S
    label, different = _count_differing(hard + clip * num_patches, table, patches, inside, size)
    chosen = (label >= 0) & (different >= min_different) & (different <= max_different)
    if targets is not None:
        target = tl.where(chosen, label, tl.where(label >= 0, UNSELECTED, INVALID))
        tl.store(targets + at, target.to(tl.int8), mask=inside)
    if written is not None:
        tl.store(written[0] + at, tl.maximum(label, 0).to(tl.int64), mask=inside)
        tl.store(written[1] + at, chosen, mask=inside)


@triton.jit
def _name(table, representative, program, num_tiles, S: tl.constexpr, SLOTS: tl.constexpr):
    """Write a clip's representatives as int64, in one of its programs; without a table a slot represents itself."""
    slots = tl.arange(0, SLOTS)
    at = (program // num_tiles).to(tl.int64) * S + slots
    leader = slots if table is None else tl.load(table + at, mask=slots < S, other=0)
    # Triton 3.9 needs a boolean mask, but `&` of a block and a number has int32
    num_written = tl.where(program % num_tiles == 0, S, 0)
    tl.store(representative + at, leader.to(tl.int64), mask=slots < num_written)


@triton.jit
def _count_differing(labels, table, patches, inside, size):
    """Return the merged labels of patches of a clip, -1 where invalid, and the number of differing neighbors."""
    num_frames, height, width = size
    column = patches % width
    row = patches // width % height
    frame = patches // (width * height)
    # offsets of the neighbors, 0 at the edges of the clip
    left, right = tl.where(column > 0, -1, 0), tl.where(column < width - 1, 1, 0)
    up, down = tl.where(row > 0, -width, 0), tl.where(row < height - 1, width, 0)
    before = tl.where(frame > 0, -height * width, 0)
    after = tl.where(frame < num_frames - 1, height * width, 0)
    here = labels + patches
    above, below = here + up, here + down
    own = _merged(here, table, inside)
    different = _differs(own, here + before, table, inside) + _differs(own, here + after, table, inside)
    different += _differs(own, here + left, table, inside) + _differs(own, here + right, table, inside)
    different += _differs(own, above, table, inside) + _differs(own, below, table, inside)
    different += _differs(own, above + left, table, inside) + _differs(own, above + right, table, inside)
    different += _differs(own, below + left, table, inside) + _differs(own, below + right, table, inside)
    return own, different


@triton.jit
def _merged(labels, table, inside):
    label = tl.load(labels, mask=inside, other=-1).to(tl.int32)
    if table is not None:
        counts = label >= 0
        label = tl.where(counts, tl.load(table + label, mask=counts, other=0).to(tl.int32), -1)
    return label


@triton.jit
def _differs(own, labels, table, inside):
    other = _merged(labels, table, inside)
    # an invalid neighbor does not differ; the count of an invalid patch is not used
    return ((own != other) & (other >= 0)).to(tl.int32)
