"""The cells of a program: a tile is (slots, patches) of one frame, read once and kept in registers.

Four kinds of tuples are arguments of most functions:

- ``shape``: frames of a clip, patches of a frame, width, tiles of a frame;
- ``place``: clip, frame, patches of the frame, which of them exist;
- ``slots``: their numbers, which of them are present, how many are present;
- a tensor and its strides (B, T, .., row, column, far): ``row`` is None if rows are contiguous, which saves a division;
  ``far`` is None unless offsets within a frame need int64.
"""

import triton
import triton.language as tl


@triton.jit
def locate(tile, shape, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the place of a tile."""
    row = tile // shape[3]
    patches, inside = patches_of(tile % shape[3], shape, TILE, COLUMNS)
    return row // shape[0], row % shape[0], patches, inside


@triton.jit
def patches_of(chunk, shape, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the patches of a tile of a frame, and which of them exist.

    A thread reads at most COLUMNS adjacent patches. It then holds all slots of its patches, and a reduction over slots
    needs no other thread.
    """
    patches = tl.max_contiguous(chunk * TILE + tl.arange(0, TILE), COLUMNS)
    return patches, patches < shape[1]


@triton.jit
def in_plane(place, shape):
    """Return the offsets of patches in a contiguous (B, T, H, W)."""
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
    """Return the addresses of the cells (slots, patches) of a frame in a map."""
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
    """Mark the cells of a tile that exist: its number of slots is a power of two, and it may exceed its frame."""
    return inside[None, :] if S == SLOTS else (slots < S)[:, None] & inside[None, :]


@triton.jit
def slots_of(slot_mask, clip, S: tl.constexpr, SLOTS: tl.constexpr):
    """Return the slots of a clip; without a mask all S are present. The number is at least 1."""
    slots = tl.arange(0, SLOTS)
    present = slots < S
    if slot_mask is not None:
        mask, strides = slot_mask
        cells = mask + clip.to(tl.int64) * strides[0] + slots.to(tl.int64) * strides[1]
        present = present & (tl.load(cells, mask=present, other=0) != 0)
    return slots, present, tl.maximum(tl.sum(present.to(tl.int32), 0), 1)


@triton.jit
def read_tile(maps, slot_mask, slots, place, shape, S: tl.constexpr, SLOTS: tl.constexpr):
    """Read a tile as float32, -inf where it exceeds the map and in absent slots.

    If slots were adjacent in memory, the compiler would divide them among threads, and each thread would run out of
    registers. The hint ``max_contiguous`` makes the compiler read every slot separately.
    """
    alone = tl.max_contiguous(tl.arange(0, SLOTS), 1)
    cells = map_cells(maps, place, alone, shape)
    x = tl.load(cells, mask=tile_mask(slots[0], place[3], S, SLOTS), other=float("-inf")).to(tl.float32)
    # cells outside the map are -inf already
    if slot_mask is not None:
        x = tl.where(slots[1][:, None], x, float("-inf"))
    return x
