"""What every tap does: hang on modules, start afresh, let go."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from typing_extensions import Self

LEFTOVERS = "is an earlier forward left in the tap? pop() or reset() after each, or give the tap its `host`"


class Held(NamedTuple):
    """A module's output, and how often it had been written to when the module was done."""

    place: str
    tensor: Tensor
    version: int | None

    @classmethod
    def now(cls, place: str, output: object) -> "Self":
        """Hold what a module has just given."""
        if not isinstance(output, Tensor):
            raise TypeError(f"{place} must give a tensor; got {type(output).__name__}.")
        # traced tensors and those of inference mode do not count writes
        counted = not (torch.compiler.is_compiling() or output.is_inference())
        return cls(place, output, output._version if counted else None)

    def get(self) -> Tensor:
        """Return the output, unless it has been written to since."""
        if self.version is not None and self.version != self.tensor._version:
            raise RuntimeError(
                f"the host wrote to the output of {self.place} in place, so what the module gave is lost."
            )
        return self.tensor


class Tap(ABC):
    """Forward hooks on a host, and what they collect; a copy, deep or unpickled, hangs on nothing and holds nothing."""

    def __init__(self, host: nn.Module | None, **modules: nn.Module) -> None:
        self._places = _places(host, modules)
        self._attached = True
        self._handles: list[RemovableHandle] = []
        if host is not None:
            self._handles.append(host.register_forward_pre_hook(self._on_host))
        self.reset()

    @abstractmethod
    def reset(self) -> None:
        """Forget what was collected, and with it the graph."""

    def remove(self) -> None:
        """Take the hooks off the host and forget what was collected; a second call does nothing."""
        # code compiled before this goes on calling the hooks, so they look at the flag
        self._attached = False
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.reset()

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._attached = False
        self._handles = []
        self.reset()

    def _on_host(self, _module: nn.Module, _args: tuple[Any, ...]) -> None:
        if self._attached:
            self.reset()

    def _require(self, name: str, collected: Sequence[object]) -> None:
        if not self._attached:
            raise RuntimeError("this tap hangs on no module: it was removed or is a copy. Attach a new one.")
        if not collected:
            raise RuntimeError(
                f"{self._places[name]} has not run since the last pop() or reset(): call the model first. If "
                "it is compiled, attach the tap before the model's first call."
            )

    def _stack(self, name: str, frames: Sequence[Tensor]) -> Tensor:
        """Make calls of one forward the frames of a clip, looking out for calls of another forward."""
        shapes = {tuple(frame.shape) for frame in frames}
        if len(shapes) > 1:
            raise RuntimeError(f"{self._places[name]} made frames of shapes {sorted(shapes)}: {LEFTOVERS}.")
        num_detached = sum(not frame.requires_grad for frame in frames)
        if 0 < num_detached < len(frames) and not torch.compiler.is_compiling():
            warnings.warn(
                f"{num_detached} of {len(frames)} frames of {self._places[name]} carry no gradient. Unless "
                f"the host means that, {LEFTOVERS}.",
                stacklevel=3,
            )
        return torch.stack(list(frames), 1)


def _places(host: nn.Module | None, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Say which modules the arguments are, by their path in the host where that is known."""
    for name, module in (({} if host is None else {"host": host}) | modules).items():
        if not isinstance(module, nn.Module):
            raise TypeError(f"`{name}` must be a module; got {type(module).__name__}.")
    paths = {} if host is None else {id(inner): path for path, inner in host.named_modules()}
    for name, module in modules.items():
        if host is not None and id(module) not in paths:
            raise ValueError(f"`host` must contain `{name}`; this {type(host).__name__} does not.")
    return {name: f"`{name}` ({paths.get(id(one)) or type(one).__name__})" for name, one in modules.items()}
