"""How a program finds its cells: a tile is (slots, patches) of one frame, read once and kept in registers.

Everywhere ``shape`` is (frames of a clip, patches of a frame, width, tiles of a frame), and a "row" is a frame counted
over the batch.
"""

import triton
import triton.language as tl


@triton.jit
def locate(tile, shape, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the row a tile of the batch lies in, its clip, the frame within that, its patches, and which exist."""
    row = tile // shape[3]
    patches, inside = patches_of(tile % shape[3], shape, TILE, COLUMNS)
    return row, row // shape[0], row % shape[0], patches, inside


@triton.jit
def patches_of(chunk, shape, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the patches of a tile of a frame, and which of them exist.

    A thread is told to read no more than COLUMNS of them side by side. So it holds all slots of its patches, and
    what goes over slots needs no other thread.
    """
    patches = tl.max_contiguous(chunk * TILE + tl.arange(0, TILE), COLUMNS)
    return patches, patches < shape[1]


@triton.jit
def patch_cells(tensor, strides, clip, frame, patches, shape, LAYOUT: tl.constexpr):
    """Return where the patches of a frame lie in a tensor with strides (B, T, row, column)."""
    start = tensor + clip.to(tl.int64) * strides[0] + frame.to(tl.int64) * strides[1]
    return start + _within(patches, strides[2], strides[3], shape[2], LAYOUT)


@triton.jit
def map_cells(maps, strides, clip, frame, slots, patches, shape, LAYOUT: tl.constexpr):
    """Return where the cells (slots, patches) of a frame lie in a map with strides (B, T, S, row, column)."""
    start = maps + clip.to(tl.int64) * strides[0] + frame.to(tl.int64) * strides[1]
    if LAYOUT == 2:
        slots = slots.to(tl.int64)
    columns = _within(patches, strides[3], strides[4], shape[2], LAYOUT)
    return start + (slots[:, None] * strides[2] + columns[None, :])


@triton.jit
def _within(patches, row_stride, column_stride, width, LAYOUT: tl.constexpr):
    """Return offsets within a frame, by its layout.

    0: rows follow each other, and no division is needed. 1: they do not. 2: offsets need int64.
    """
    if LAYOUT == 2:
        patches = patches.to(tl.int64)
    if LAYOUT == 0:
        offsets = patches * column_stride
    else:
        offsets = patches // width * row_stride + patches % width * column_stride
    return offsets


@triton.jit
def tile_mask(slots, inside, S: tl.constexpr, SLOTS: tl.constexpr):
    """Tell which cells of a tile exist: it has a power of two slots, and may stick out of its frame."""
    return inside[None, :] if S == SLOTS else (slots < S)[:, None] & inside[None, :]


@triton.jit
def present_slots(slot_mask, strides, clip, slots, S: tl.constexpr):
    """Tell which slots of a clip are present, all S without a mask, and how many, at least 1."""
    present = slots < S
    if slot_mask is not None:
        cells = slot_mask + clip.to(tl.int64) * strides[0] + slots.to(tl.int64) * strides[1]
        present = present & (tl.load(cells, mask=present, other=0) != 0)
    return present, tl.maximum(tl.sum(present.to(tl.int32), 0), 1)


@triton.jit
def read_tile(
    maps,
    strides,
    slot_mask,
    present,
    clip,
    frame,
    slots,
    patches,
    inside,
    shape,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Read a tile as float32, -inf where it sticks out and in absent slots: these win nothing and have no share.

    Where slots lie side by side in memory threads would share them out: each would do the work of all its patches
    over again, and run out of registers. So every slot is read on its own, and the cache sees to the rest.
    """
    alone = tl.max_contiguous(tl.arange(0, SLOTS), 1)
    cells = map_cells(maps, strides, clip, frame, alone, patches, shape, LAYOUT)
    x = tl.load(cells, mask=tile_mask(slots, inside, S, SLOTS), other=float("-inf")).to(tl.float32)
    # what sticks out is -inf already
    if slot_mask is not None:
        x = tl.where(present[:, None], x, float("-inf"))
    return x
