"""A meter of the work and the memory of a computation."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Counts operators, the elements that they read and write, and the bytes in use.

    Views and the memory of the inputs do not count.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_operators = 0
        self.num_elements = 0
        self.peak = 0
        # the inputs belong to the caller
        self._given = [one.untyped_storage() for one in given]
        self._ignored = {one._cdata for one in self._given}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        written = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        if not func.is_view:
            read = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
            self.num_operators += 1
            self.num_elements += sum(one.numel() for one in read + written)
        for one in written:
            storage = one.untyped_storage()
            if storage._cdata not in self._ignored:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    @property
    def alive(self) -> int:
        """Number of bytes in use."""
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        return sum(size for _, size in self._alive.values())
