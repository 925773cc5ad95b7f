"""The division of maps into tiles, and the strides of maps as kernel arguments, from shapes and strides alone."""

from typing import NamedTuple

from torch import Tensor

from ssync_loss.ssync.engines.triton._limits import VERSION

# cells of a tile per thread, all in registers. With many slots the number is halved, as a thread keeps more numbers for
# each slot. With 32 cells Triton 3.6 spills hundreds of bytes.
THREAD_CELLS = 32 if VERSION >= (3, 7) else 16
MANY_SLOTS = 64
# a program has NUM_WARPS warps if a frame then has at least MANY_TILES tiles, else one warp
NUM_WARPS = 4
MANY_TILES = 8


class Tiling(NamedTuple):
    """The division of maps (B, T, S, H, W) into tiles (slots, patches) within a frame.

    >>> import torch
    >>> tiling = Tiling.of(torch.empty(2, 3, 11, 24, 24))
    >>> tiling.slots, tiling.num_patches == tiling.tile * tiling.num_chunks
    (16, True)
    """

    num_clips: int
    num_frames: int
    num_slots: int
    height: int
    width: int
    slots: int
    tile: int
    num_warps: int
    num_chunks: int

    @classmethod
    def of(cls, maps: Tensor) -> "Tiling":
        """Divide maps into tiles; the numbers of slots and patches of a tile are powers of two."""
        num_clips, num_frames, num_slots, height, width = maps.shape
        slots = power_of_two(num_slots)
        num_patches = height * width
        widest = 32 * THREAD_CELLS // slots // (2 if slots >= MANY_SLOTS else 1)
        num_warps = NUM_WARPS if num_patches >= MANY_TILES * NUM_WARPS * widest else 1
        tile = min(num_warps * widest, power_of_two(num_patches))
        num_chunks = ceil_divide(num_patches, tile)
        return cls(num_clips, num_frames, num_slots, height, width, slots, tile, num_warps, num_chunks)

    @property
    def num_patches(self) -> int:
        """Patches of a frame."""
        return self.height * self.width

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The kernels' argument ``shape``."""
        return self.num_frames, self.num_patches, self.width, self.num_chunks

    @property
    def plane_size(self) -> int:
        """Patches of the batch."""
        return self.num_clips * self.num_frames * self.num_patches

    @property
    def clip_tiles(self) -> int:
        """Tiles of a clip."""
        return self.num_frames * self.num_chunks

    @property
    def num_tiles(self) -> int:
        """Tiles of the batch."""
        return self.num_clips * self.clip_tiles

    @property
    def constants(self) -> dict[str, int]:
        """The compile-time constants of a kernel over tiles."""
        columns = max(self.tile // (32 * self.num_warps), 1)
        cells = {"S": self.num_slots, "SLOTS": self.slots, "TILE": self.tile, "COLUMNS": columns}
        return cells | {"num_warps": self.num_warps}


def strided(tensor: Tensor | None) -> tuple[Tensor, tuple[int | None, ...]] | None:
    """Return a tensor (B, T, .., H, W) and its strides, in the form that the module ``tiles`` explains.

    >>> import torch
    >>> whole = torch.empty(1, 1, 2, 4, 5)
    >>> strided(whole)[1], strided(whole[..., ::2, :])[1]
    ((40, 40, 20, None, 1, None), (40, 40, 20, 10, 1, None))
    """
    if tensor is None:
        return None
    *outer, row, column = tensor.stride()
    height, width = tensor.shape[-2:]
    if sum((size - 1) * stride for size, stride in zip(tensor.shape[2:], tensor.stride()[2:], strict=True)) >= 2**31:
        return tensor, (*outer, row, column, 1)
    if width == 1:
        # a row has one patch: the next patch is in the next row
        return tensor, (*outer, None, row, None)
    return tensor, (*outer, None if height == 1 or row == width * column else row, column, None)


def masked(slot_mask: Tensor | None) -> tuple[Tensor, tuple[int, ...]] | None:
    return None if slot_mask is None else (slot_mask, slot_mask.stride())


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below a number."""
    return 1 << (number - 1).bit_length()


def ceil_divide(number: int, by: int) -> int:
    """Divide, and round up."""
    return -(-number // by)
