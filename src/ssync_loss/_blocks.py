"""Walking through maps in pieces that stay in a CPU's cache, without asking for memory at every step."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# elements of a piece: half a megabyte of float32
BLOCK_ELEMENTS = 1 << 17


class Blocks:
    """Pieces of (B, T, S, H, W) maps, whole frames each; how many depends on the shape alone.

    On accelerators and under compilation there is one piece: launches count there, not caches.

    >>> blocks = Blocks(torch.zeros(2, 3, 4, 128, 128))
    >>> [tuple(torch.empty(2, 3)[piece].shape) for piece in blocks]
    [(1, 2), (1, 1), (1, 2), (1, 1)]
    """

    def __init__(self, maps: Tensor) -> None:
        num_clips, num_frames, *frame = maps.shape
        self._clips, self._frames, self._frame = num_clips, num_frames, frame
        self._pieces = [(slice(None), slice(None))]
        if maps.device.type == "cpu" and not torch.compiler.is_compiling():
            size = max(frame[0] * frame[1] * frame[2], 1)
            self._frames = min(max(BLOCK_ELEMENTS // size, 1), num_frames)
            self._clips = min(max(BLOCK_ELEMENTS // (size * num_frames), 1), num_clips)
            self._pieces = [
                (slice(clip, clip + self._clips), slice(first, first + self._frames))
                for clip in range(0, num_clips, max(self._clips, 1))
                for first in range(0, num_frames, self._frames)
            ]

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Yield the index of every piece into the first two axes."""
        return iter(self._pieces)

    def scratch(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return memory for the largest piece, taken once: fresh pages cost more than the arithmetic on them."""
        return torch.empty(self._clips, self._frames, *self._frame, dtype=dtype, device=like.device)


def part_of(scratch: Tensor, piece: Tensor) -> Tensor:
    """Return the part of a scratch map that has the piece's shape."""
    return scratch[: piece.shape[0], : piece.shape[1]]


def indicator(compare: Callable[..., Tensor], cells: Tensor, other: Tensor, out: Tensor) -> Tensor:
    """Write 1 where ``compare(cells, other)`` and 0 elsewhere, as numbers of the map's own type.

    On a CPU this takes a quarter of the time of a boolean comparison against a broadcast operand.
    """
    result: Tensor = compare(cells, other, out=part_of(out, cells))
    return result
