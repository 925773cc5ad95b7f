"""Score matrices, some of their rows at a time."""

from torch import Tensor


class Chunks:
    """Pieces of the W score matrices of M rows each; how many depends on the shape alone.

    ``chunk_size`` rows are held at once: as many windows as fit in whole, or else a part of one. Their memory is
    taken once, as fresh pages cost more than the arithmetic on them.

    >>> chunks = Chunks(3, 4, 9)
    >>> chunks.windows, chunks.rows
    ([slice(0, 2, None), slice(2, 4, None)], [slice(0, 4, None)])
    >>> Chunks(2, 4, 3).rows
    [slice(0, 3, None), slice(3, 6, None)]
    """

    def __init__(self, num_windows: int, num_patches: int, chunk_size: int | None) -> None:
        # whole slices where nothing is cut, so that a compiler need not fix the number of windows
        self.windows = self.rows = [slice(None)]
        self._shape = (num_windows, num_patches, num_patches)
        if chunk_size is not None:
            windows, rows = max(chunk_size // num_patches, 1), min(chunk_size, num_patches)
            self.windows = [slice(first, first + windows) for first in range(0, num_windows, windows)]
            self.rows = [slice(first, first + rows) for first in range(0, num_patches, rows)]
            self._shape = (min(windows, num_windows), rows, num_patches)
        self._memory: dict[str, Tensor] = {}

    def products(self, name: str, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        """Return ``scale * left @ right.mT``, written over what last had that name."""
        if name not in self._memory:
            self._memory[name] = left.new_empty(self._shape)
        part = self._memory[name][: left.shape[0], : left.shape[1]]
        return part.baddbmm_(left, right.mT, beta=0, alpha=scale)
