"""Walking through maps in pieces that stay in a CPU's cache, without asking for memory at every step."""

from collections.abc import Callable
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

# elements of a block: a megabyte of float32
BLOCK_ELEMENTS = 1 << 18


# everything: small batches save the views
ALL = slice(None)


class Blocks:
    """How to walk through (B, T, S, H, W) maps, and scratch memory for it.

    Whole clips go together in groups, so that what a stage does with a clip is done while its maps are in the
    cache. A clip that is larger than a block goes alone, and is walked through in groups of frames where scratch
    memory is needed. How many there are depends on the shape alone. On accelerators and under compilation there is
    one group of all frames: launches count there, not caches.

    Args:
        maps: what is walked through; only shape and device count.
        dtype: of the scratch memory; None for that of the maps.
        num_maps: how many maps scratch memory is wanted for at once.

    Attributes:
        frames: index of every group of frames within clips that go together.

    >>> maps = torch.zeros(5, 3, 2, 128, 128)
    >>> [len(some) for some, _ in Blocks(maps).groups(maps, None)]
    [2, 2, 1]
    >>> Blocks(torch.zeros(1, 20, 2, 128, 128)).frames
    [slice(0, 8, None), slice(8, 16, None), slice(16, 20, None)]
    """

    def __init__(self, maps: Tensor, dtype: torch.dtype | None = None, num_maps: int = 1) -> None:
        num_clips, num_frames, *frame = maps.shape
        clips, frames = num_clips, num_frames
        size = frame[0] * frame[1] * frame[2]
        if _has_cache(maps):
            clips = min(max(BLOCK_ELEMENTS // (max(size, 1) * num_frames), 1), num_clips)
            frames = min(max(BLOCK_ELEMENTS // max(size, 1), 1), num_frames)
        self.frames = _slices(num_frames, frames)
        self._clips, self._num_groups, self._patches = clips, -(-num_clips // max(clips, 1)), frame[1] * frame[2]
        # taken once: fresh pages cost more than the arithmetic on them
        length = num_maps * clips * frames * size
        self._memory = torch.empty(length, dtype=dtype or maps.dtype, device=maps.device)

    def groups(self, *tensors: Tensor | None, dim: int = 0) -> list[tuple[Any, ...]]:
        """Cut what there is of all clips, along an axis of them, and return every group's parts; None stays None."""
        if self._num_groups <= 1:
            return [tensors]
        # all at once: to slice takes as long as many an operator
        parts = ([None] * self._num_groups if one is None else one.split(self._clips, dim) for one in tensors)
        return list(zip(*parts, strict=True))

    @cached_property
    def patches(self) -> Tensor:
        """The numbers of the patches of a frame: (H W,) int64."""
        return torch.arange(self._patches, device=self._memory.device)

    def scratch(self, *shape: int) -> Tensor:
        """Return memory of a shape; every call returns the same."""
        length = prod(shape)
        return (self._memory if length == self._memory.numel() else self._memory[:length]).view(shape)


def _slices(length: int, step: int) -> list[slice]:
    if length <= step:
        return [ALL]
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def in_blocks(maps: Tensor) -> bool:
    """Tell whether groups of whole clips stay in the cache."""
    return _has_cache(maps) and maps[:1].numel() <= BLOCK_ELEMENTS


def _has_cache(maps: Tensor) -> bool:
    """Tell whether it is operators on a CPU that walk through maps."""
    return maps.device.type == "cpu" and not torch.compiler.is_compiling()


def frames_of(frames: slice, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Return some frames of all (.., T, S, H, W) that are there."""
    return tensors if frames == ALL else tuple(None if one is None else one[..., frames, :, :, :] for one in tensors)


def in_one(pieces: list[Tensor], dim: int = 0) -> Tensor:
    """Put together what was computed in pieces; a single one costs nothing."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def indicator(
    compare: Callable[..., Tensor], cells: Tensor, other: Tensor | float, out: Tensor | None = None
) -> Tensor:
    """Return 1 where ``compare(cells, other)`` and 0 elsewhere, as numbers of the map's own type.

    They are written to ``out``, if that is given and nothing is being compiled.
    On a CPU this takes a quarter of the time of a boolean comparison against a broadcast operand.
    """
    if torch.compiler.is_compiling():
        # a compiler gives what is written `out` the strides of what is read
        return compare(cells, other).to(cells.dtype)
    result: Tensor = compare(cells, other, out=torch.empty_like(cells) if out is None else out)
    return result
