"""How a program finds its cells: a tile is (slots, patches) of one frame, read once and kept in registers.

What travels together is a tuple everywhere:

- ``shape``: frames of a clip, patches of a frame, width, tiles of a frame;
- ``place``: clip, frame, patches of the frame, which of them exist;
- ``slots``: their numbers, which of them are present, how many are;
- a tensor, and its strides (B, T, .., row, column, far): ``row`` is None where rows follow each other, so that no
  division is needed, and ``far`` is not None where offsets within a frame need int64.
"""

import triton
import triton.language as tl


@triton.jit
def locate(tile, shape, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the place of a tile of the batch."""
    row = tile // shape[3]
    patches, inside = patches_of(tile % shape[3], shape, TILE, COLUMNS)
    return row // shape[0], row % shape[0], patches, inside


@triton.jit
def patches_of(chunk, shape, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the patches of a tile of a frame, and which of them exist.

    A thread is told to read no more than COLUMNS of them side by side. So it holds all slots of its patches, and
    what goes over slots needs no other thread.
    """
    patches = tl.max_contiguous(chunk * TILE + tl.arange(0, TILE), COLUMNS)
    return patches, patches < shape[1]


@triton.jit
def in_plane(place, shape):
    """Return where patches lie in a plane (B, T, H, W) without gaps."""
    return (place[0].to(tl.int64) * shape[0] + place[1]) * shape[1] + place[2]


@triton.jit
def read_patches(strided, place, shape):
    """Read the patches of a frame, 0 where they do not exist."""
    tensor, strides = strided
    start = tensor + place[0].to(tl.int64) * strides[0] + place[1].to(tl.int64) * strides[1]
    cells = start + _within(place[2], strides[2], strides[3], strides[4], shape[2])
    return tl.load(cells, mask=place[3], other=0)


@triton.jit
def map_cells(strided, place, slots, shape):
    """Return where the cells (slots, patches) of a frame lie in a map."""
    maps, strides = strided
    start = maps + place[0].to(tl.int64) * strides[0] + place[1].to(tl.int64) * strides[1]
    if strides[5] is not None:
        slots = slots.to(tl.int64)
    columns = _within(place[2], strides[3], strides[4], strides[5], shape[2])
    return start + (slots[:, None] * strides[2] + columns[None, :])


@triton.jit
def _within(patches, row, column, far, width):
    if far is not None:
        patches = patches.to(tl.int64)
    return patches * column if row is None else patches // width * row + patches % width * column


@triton.jit
def tile_mask(slots, inside, S: tl.constexpr, SLOTS: tl.constexpr):
    """Tell which cells of a tile exist: it has a power of two slots, and may stick out of its frame."""
    return inside[None, :] if S == SLOTS else (slots < S)[:, None] & inside[None, :]


@triton.jit
def slots_of(slot_mask, clip, S: tl.constexpr, SLOTS: tl.constexpr):
    """Return the slots of a clip: without a mask all S are present. At least 1 is counted."""
    slots = tl.arange(0, SLOTS)
    present = slots < S
    if slot_mask is not None:
        mask, strides = slot_mask
        cells = mask + clip.to(tl.int64) * strides[0] + slots.to(tl.int64) * strides[1]
        present = present & (tl.load(cells, mask=present, other=0) != 0)
    return slots, present, tl.maximum(tl.sum(present.to(tl.int32), 0), 1)


@triton.jit
def read_tile(maps, slot_mask, slots, place, shape, S: tl.constexpr, SLOTS: tl.constexpr):
    """Read a tile as float32, -inf where it sticks out and in absent slots: these win nothing and have no share.

    Where slots lie side by side in memory threads would share them out: each would do the work of all its patches
    over again, and run out of registers. So every slot is read on its own, and the cache sees to the rest.
    """
    alone = tl.max_contiguous(tl.arange(0, SLOTS), 1)
    cells = map_cells(maps, place, alone, shape)
    x = tl.load(cells, mask=tile_mask(slots[0], place[3], S, SLOTS), other=float("-inf")).to(tl.float32)
    # what sticks out is -inf already
    if slot_mask is not None:
        x = tl.where(slots[1][:, None], x, float("-inf"))
    return x
