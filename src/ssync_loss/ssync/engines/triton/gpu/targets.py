"""What each patch teaches: merged labels of it and its neighbors, the two regions, int8 targets."""

import triton
import triton.language as tl

# what a target holds where there is none
UNSELECTED = tl.constexpr(-1)
INVALID = tl.constexpr(-2)


@triton.jit
def target_kernel(
    labels,
    table,
    targets,
    enc_labels,
    dec_labels,
    boundary,
    interior,
    representative,
    min_different,
    max_boundary,
    max_interior,
    plane_size,
    num_frames,
    height,
    width,
    num_tiles,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write int8 targets (2, B, T, H, W), what is wanted of the decoder and of the encoder, and labels if asked.

    A target is the slot a patch should belong to, -1 where nothing is taught and -2 where the patch does not
    count. ``table`` is None without merging; either ``targets`` or the five that make ``PseudoLabels`` may be.
    """
    program = tl.program_id(0)
    half = tl.num_programs(0) // 2
    if program < half:
        _select(
            labels, table, targets, enc_labels, boundary, program, min_different, max_boundary,
            num_frames, height, width, num_tiles, S, TILE,
        )  # fmt: skip
        if representative is not None:
            _name(table, representative, program, num_tiles, S, SLOTS)
    else:
        if targets is not None:
            targets += plane_size
        _select(
            labels + plane_size, table, targets, dec_labels, interior, program - half, 0, max_interior,
            num_frames, height, width, num_tiles, S, TILE,
        )  # fmt: skip


@triton.jit
def _select(
    labels,
    table,
    targets,
    merged,
    region,
    program,
    min_different,
    max_different,
    num_frames,
    height,
    width,
    num_tiles,
    S: tl.constexpr,
    TILE: tl.constexpr,
):
    clip = (program // num_tiles).to(tl.int64)
    patches = program % num_tiles * TILE + tl.arange(0, TILE)
    num_patches = num_frames * height * width
    inside = patches < num_patches
    at = clip * num_patches + patches
    if table is not None:
        table += clip * S
    label, different = _count_differing(labels + clip * num_patches, table, patches, inside, num_frames, height, width)
    chosen = (label >= 0) & (different >= min_different) & (different <= max_different)
    if targets is not None:
        target = tl.where(chosen, label, tl.where(label >= 0, UNSELECTED, INVALID))
        tl.store(targets + at, target.to(tl.int8), mask=inside)
    if merged is not None:
        tl.store(merged + at, tl.maximum(label, 0).to(tl.int64), mask=inside)
        tl.store(region + at, chosen, mask=inside)


@triton.jit
def _name(table, representative, program, num_tiles, S: tl.constexpr, SLOTS: tl.constexpr):
    """Write the representatives of a clip as int64, once; without merging every slot is its own."""
    slots = tl.arange(0, SLOTS)
    at = (program // num_tiles).to(tl.int64) * S + slots
    leader = slots
    if table is not None:
        leader = tl.load(table + at, mask=slots < S, other=0)
    tl.store(representative + at, leader.to(tl.int64), mask=(slots < S) & (program % num_tiles == 0))


@triton.jit
def _count_differing(labels, table, patches, inside, num_frames, height, width):
    """Return the merged labels of patches of a clip, -1 where invalid, and how many of ten neighbors differ."""
    column = patches % width
    row = patches // width % height
    frame = patches // (width * height)
    # steps to the neighbors; at an edge of the clip none is taken
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
    # an invalid neighbor agrees with everyone; what an invalid patch counts is not looked at
    return ((own != other) & (other >= 0)).to(tl.int32)
